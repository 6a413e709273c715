"""How modules are imported: as licq.*, and only downwards in the list of rooms (docs, design)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ORDER = (  # from the top; a module imports from its own line and those below
    {"licq"},
    {"main_ptq", "main_eval"},
    {"sweeps"},
    {"runs"},
    {"report"},
    {"evaluation"},
    {"codec"},
    {"integer"},
    {"reconstruction"},
    {"quant"},
    {"models", "data"},
    {"workers"},
    {"support"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ROOMS = set(LEVEL) - {"licq", "main_ptq", "main_eval"}
BESIDE = {"benchmarks", "examples"}  # folders of the checkout that are no part of the package

# (importing module, imported room) -> why it is so. This table shrinks.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def python_files() -> list[Path]:
    """Every Python file of the checkout, without environments, builds and results."""
    skipped = {"build", "dist", "site", "node_modules"}
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if not any(part.startswith(".") or part in skipped for part in path.relative_to(ROOT).parts)
        and not (path.relative_to(ROOT).parts[0] == "runs" and path.parent != ROOT / "runs")
    ]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also of those in functions and for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "licq":  # `from licq import completion`, or a public name of the facade
                yield from ((node.lineno, f"licq.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, node.args[0].value


def room_of(module: str) -> str:
    """The room of a module: what `ORDER` calls it, or "licq" for the facade's own modules and names."""
    top, _, rest = module.partition(".")
    if top != "licq":
        return top
    return rest.partition(".")[0] if rest.partition(".")[0] in ROOMS else "licq"


def code_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """(line, code) of each fenced or indented block of a Markdown page."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(
        r"^( *)```[^\n]*\n(.*?)^\1```|(?:^(?: {4}|\t).*\n)+", text, re.MULTILINE | re.DOTALL
    ):
        yield text[: match.start()].count("\n") + (0 if match[2] is None else 1), match[2] or match[0]


def bare_imports(code: str) -> list[tuple[int, str]]:
    """(line, text) of imports of a room without licq., in code that need not be whole."""
    rooms = "|".join(sorted(ROOMS))
    pattern = re.compile(
        rf"^\s*(?:>>> *)?(?:import|from) +(?:{rooms})(?:\.[\w.]+)?(?=\s|,|$).*$", re.MULTILINE
    )
    return [(code[: match.start()].count("\n") + 1, match[0].strip()) for match in pattern.finditer(code)]


def test_modules_are_imported_as_licq():
    found = {
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files()
        for line, module in imports(ast.parse(path.read_text(encoding="utf-8")))
        if module.partition(".")[0] in ROOMS
    }
    assert not found, "import licq.<room>, not the bare name"
    assert len(python_files()) > 150


def test_pages_show_imports_of_licq():
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    found = {
        f"{page.relative_to(ROOT)}:{first + line}: {text}"
        for page in pages
        for first, code in code_blocks(page)
        for line, text in bare_imports(code)
    }
    assert not found, "import licq.<room>, not the bare name"
    assert pages


def test_bare_imports_are_found():
    code = "import licq\nfrom models.network import Mine\n  import quant, os\nfrom licq.quant import x"
    assert [line for line, _ in bare_imports(code)] == [2, 3]
    tree = ast.parse(
        "def f():\n    from support.files import x\n    importlib.import_module('licq.quant.model')"
    )
    assert sorted(imports(tree)) == [(2, "support.files"), (3, "licq.quant.model")]


def upward() -> dict[tuple[str, str], list[str]]:
    """(importing module, imported room) -> the imports that go up."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in python_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[0]
        if room not in LEVEL:
            continue
        module = ".".join(parts)
        for line, imported in imports(ast.parse(path.read_text(encoding="utf-8"))):
            other = room_of(imported)
            up = other in LEVEL and LEVEL[other] < LEVEL[room]
            if up or other in ("tests", "benchmarks", "examples", "setup"):
                found.setdefault((module, other), []).append(f"line {line}: {imported}")
    return found


def test_imports_go_downwards():
    found = upward()
    assert not {key: lines for key, lines in found.items() if key not in EXCEPTIONS}
    assert set(EXCEPTIONS) <= set(found), "what does not go up any more leaves the table"


def circles() -> list[set[str]]:
    """Groups of modules that import each other in a loop, imports in functions and for type checkers
    counted."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in LEVEL or path.stem in LEVEL
    }
    graph = {}
    for module, path in modules.items():
        others = {
            name.removeprefix("licq.") for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        }
        names = {
            f"{node.module.removeprefix('licq.')}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        graph[module] = ((others | names) & modules.keys()) - {module}

    def reached(start: str) -> set[str]:
        seen, pending = set(), [start]
        while pending:
            for other in graph[pending.pop()] - seen:
                seen.add(other)
                pending.append(other)
        return seen

    reach = {module: reached(module) for module in graph}
    looped = [module for module in graph if module in reach[module]]
    return list({frozenset(b for b in looped if b in reach[a] and a in reach[b]): 0 for a in looped})


def test_no_modules_import_each_other():
    assert not circles()
