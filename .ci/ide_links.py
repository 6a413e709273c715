"""Links below build/ide/licq/ by which type checkers and IDEs find licq.<room> in a checkout: `make ide`.

At run time licq/__init__.py looks beside itself, which no static tool sees. pyproject.toml names build/ide in
pyright's `extraPaths`; in VS Code it is `python.analysis.extraPaths`.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    folder = ROOT / "build" / "ide" / "licq"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    packages = {path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "licq", ROOT / "tests"}
    facade = (ROOT / "licq").iterdir()
    for path in sorted([*packages, *(path for path in facade if path.suffix in (".py", ".typed"))]):
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    print(f"{folder.relative_to(ROOT)}: {len(packages)} rooms", file=sys.stderr)


main()
