"""The preset files that come with the project. Listing them imports no torch."""

from pathlib import Path

PRESETS = Path(__file__).parent / "presets"


def list_presets() -> list[str]:
    """The names of the presets that come with the project, sorted; `PtqConfig.from_preset` takes one."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
