"""`import licq`: light, complete, documented."""

import ast
import inspect
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import licq
from licq.models import registry

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "scipy", "compressai", "PIL", "yaml"}


def imported_by(code: str) -> set[str]:
    """The top-level modules that a fresh Python has after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize(
    "code",
    [
        "import licq; licq.__version__, licq.InputError, licq.__all__, dir(licq)",
        "import licq; assert len(licq.list_models()) > 10",
        "import licq; assert 'licq' in licq.list_presets()",
        "import licq; licq.register_model",
        "from licq.command import main; main(['--help']), main(['--version'])",
        "from licq.command import main; main(['quantize', '--w_bits', '99'])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    found = imported_by(code) & HEAVY
    assert found <= ({"yaml"} if "quantize" in code else set())  # the sweeps that --help lists


def test_import_takes_well_under_a_second():
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import licq"], cwd=ROOT, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5  # with the start of Python; 0.03 where nothing else runs


def test_every_public_name_is_there_and_documented():
    for name in licq.__all__:
        value = getattr(licq, name)
        assert name in dir(licq)
        if name != "__version__":
            assert name in (licq.__doc__ or "") and len(inspect.getdoc(value) or "") > 40, name
    with pytest.raises(AttributeError, match="no attribute 'dequantize'"):
        licq.dequantize  # noqa: B018


def test_type_checkers_see_the_names_where_they_are_at_run_time():
    tree = ast.parse((ROOT / "licq" / "__init__.py").read_text())
    (guarded,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == licq._MODULE_OF and set(seen) == set(licq.__all__)
    assert (ROOT / "licq" / "py.typed").is_file()


def test_models_are_listed_by_the_modules_that_register_them():
    registered = {}
    for path in (ROOT / "models").glob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "register_model"
        ]
        if calls:
            registered[f"licq.models.{path.stem}"] = tuple(ast.literal_eval(call.args[0]) for call in calls)
    assert {module: set(names) for module, names in registered.items()} == {
        module: set(names) for module, names in registry._BUILT_IN.items()
    }


def test_modules_of_every_room_can_be_imported_under_the_one_name():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "licq"}
    assert rooms <= {module.name for module in pkgutil.iter_modules(licq.__path__)}
    assert not {"quant", "models", "support"} & {name for name in sys.modules if "." not in name}
