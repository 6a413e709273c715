"""Imports of a plug-in file: it finds the modules beside it, as a script does."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_CHECKOUT = str(Path(__file__).resolve().parent.parent)


def find_beside(folder: Path) -> Callable[[], None]:
    """From now on, also have imports look in `folder`, first; returns what takes that back.

    Not by sys.path: its entries go along to worker processes, where a folder licq/ that is no package (a
    clone, results) would hide an editable install.
    """
    finder = _BesidePlugin(str(folder))
    if finder in sys.meta_path:  # another plug-in lies there
        return lambda: None
    first = next((i for i, other in enumerate(sys.meta_path) if other is PathFinder), 0)
    sys.meta_path.insert(first, finder)
    return lambda: sys.meta_path.remove(finder)


class _BesidePlugin:
    """Finds top-level modules and packages in one folder; Python's own rules but for two names.

    licq is never found there. A folder without __init__.py gives way to an installed package, but not to the
    rooms of a checkout, which `python .../main_ptq.py` puts on the path: models/ is the user's.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BesidePlugin) and other.folder == self.folder

    __hash__ = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The protocol of `sys.meta_path`."""
        if path is not None or name == "licq":
            return None
        spec = PathFinder.find_spec(name, [self.folder])
        if spec is None or spec.loader is not None:
            return spec
        elsewhere = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != _CHECKOUT]
        installed = PathFinder.find_spec(name, elsewhere)
        if installed is not None and installed.loader is not None:
            return None
        # A list: the path that Python keeps here would be looked up in sys.path again.
        spec.submodule_search_locations = list(spec.submodule_search_locations or ())
        return spec
