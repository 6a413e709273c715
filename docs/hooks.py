"""What the documentation's build needs before it reads the pages."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "docs" / "licq"
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_startup(**_) -> None:
    """Make build/docs/licq, a folder of links that looks like an installed package.

    mkdocstrings reads sources without importing them, so it cannot follow `licq.__path__` to the folders
    beside licq/.
    """
    TREE.mkdir(parents=True, exist_ok=True)
    sources = list((ROOT / "licq").glob("*.py"))
    sources += [
        path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("licq", "tests")
    ]
    for link in TREE.iterdir():
        link.unlink()
    for source in sources:
        (TREE / source.name).symlink_to(source)


def on_files(files, config):
    """Add the root's CHANGELOG.md and CONTRIBUTING.md; their links into docs/ lose that folder."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=re.sub(r"\]\(docs/", "](", text)))
    return files
