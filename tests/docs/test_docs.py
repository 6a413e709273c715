"""README.md and the documentation say what is true: links exist, code runs, tables are those of the stored
results."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import licq
from benchmarks import results
from tests.tiny_codecs import images, tiny_codec

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", word) for word in words}


def test_readme_fits_two_screens():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert not [line for line in lines if re.search(r"\bcommit [0-9a-f]{7}\b", line)]


def test_readme_python_runs(tmp_path, monkeypatch, make_image):
    """With a tiny codec, two crops and one photograph instead of the reader's."""
    (block,) = python_blocks(ROOT / "README.md")
    make_image("photo.png", 96, 64, folder=tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    quick = licq.PtqConfig.from_preset("licq", joint_iters=1)
    monkeypatch.setattr("licq.reconstruction.config.PtqConfig.from_preset", lambda *_, **__: quick)
    names = {
        "model": tiny_codec("balle2018"),
        "images": images(2),
        "pixels": (images(1)[0] * 255).byte(),
    }
    exec(compile(block.replace('"kodak"', repr(str(tmp_path / "photos"))), "README.md", "exec"), names)
    assert names["pixels"].shape == (3, 64, 64)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_use_public_names(path):
    for block in python_blocks(path):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "licq"
            ):
                assert node.attr in licq.__all__, f"{path.name}: licq.{node.attr} is not public"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(page), f"{path.name}: {target}"


def test_every_page_is_in_the_navigation():
    def files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            name for part in (entry.values() if isinstance(entry, dict) else entry) for name in files(part)
        ]

    named = set(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    generated = {"changelog.md", "contributing.md"}  # docs/hooks.py
    assert named - generated == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_python_page_has_every_public_name():
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    missing = [name for name in licq.__all__ if name != "__version__" and f"::: licq.{name}\n" not in text]
    assert not missing


def test_pages_are_those_of_the_stored_results():
    different = [
        str(path.relative_to(ROOT))
        for path, text in results.render().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert not different, "run python benchmarks/results.py"


def test_sections_that_docstrings_name_exist():
    sections = {
        int(number) for number in re.findall(r"^## (\d+)\. ", (DOCS / "design.md").read_text(), re.MULTILINE)
    }
    named = set()
    for path in ROOT.glob("*/*.py"):
        named |= {int(number) for number in re.findall(r"[Dd]esign,? section (\d+)", path.read_text())}
    assert named <= sections
