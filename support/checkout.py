"""How another Python finds the licq that runs."""

from pathlib import Path

# the folder of quant/, models/ ...: a checkout, or licq/ of a wheel
_ROOMS = Path(__file__).resolve().parent.parent


def licq_alone(folder: Path) -> Path:
    """A folder below `folder` that holds the running licq and nothing else, for the PYTHONPATH of another
    Python.

    So the other Python imports the same licq, be that a checkout or a wheel, and its own packages stay its
    own.
    """
    path = folder / "path"
    if not path.exists():
        path.mkdir()
        (path / "licq").symlink_to(_ROOMS / "licq" if (_ROOMS / "licq").is_dir() else _ROOMS)
    return path
