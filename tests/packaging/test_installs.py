"""The four ways to run licq: from a wheel, from an sdist, editable, as scripts of a checkout; each from a
user's folder whose packages have the names of the project's."""

import csv
import tarfile
import zipfile
from pathlib import Path

import pytest

from licq.support.version import __version__
from tests.packaging.conftest import ROOT

LIGHT = """
import sys, licq
assert licq.__version__ and len(licq.list_models()) > 10 and "licq" in licq.list_presets()
assert not {"torch", "numpy"} & set(sys.modules)
from licq.integer.library import library
assert library() is not None  # the C kernels
print(licq.__file__)
"""


def names_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_has_one_package_and_the_two_scripts(wheel_without_kernels):
    wheel = wheel_without_kernels
    top = {name.partition("/")[0] for name in names_of(wheel)}
    facts = f"licq-{__version__}.dist-info"
    assert top == {"licq", "main_ptq.py", "main_eval.py", facts}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{facts}/entry_points.txt").decode().split() == (
            "[console_scripts] licq = licq.command:main".split()
        )
        metadata = archive.read(f"{facts}/METADATA").decode()
    for line in ("Name: licq", f"Version: {__version__}", "License-Expression: Apache-2.0"):
        assert line in metadata.splitlines()
    for field in ("Project-URL: Source", "Project-URL: Documentation", "Project-URL: Changelog", "Keywords:"):
        assert f"\n{field}" in metadata


@pytest.mark.parametrize("kind", ["wheel_without_kernels", pytest.param("wheel", marks=pytest.mark.slow)])
def test_wheel_and_sdist_hold_every_file_that_is_no_code_too(kind, sdist, request):
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert len(rooms) > 10
    data = {
        path.relative_to(ROOT).as_posix()
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".safetensors", ".yaml", ".json", ".j2", ".h", ".typed")
        and (room != "runs" or len(path.relative_to(ROOT).parts) == 2)
    }
    code = {path.relative_to(ROOT).as_posix() for room in rooms for path in (ROOT / room).glob("*.py")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "integer").glob("*.c")}
    assert len(data) > 40 and len(sources) > 4
    inside = names_of(request.getfixturevalue(kind))
    wanted = {f"licq/{name}".replace("licq/licq/", "licq/") for name in data | code}
    assert wanted <= set(inside), sorted(wanted - set(inside))
    kernels = any(name.startswith("licq/integer/_kernels") for name in inside)
    assert kernels or kind == "wheel_without_kernels"
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = (
        data | code | sources | {"setup.py", "pyproject.toml", "README.md", "main_ptq.py", "main_eval.py"}
    )
    assert needed <= files, sorted(needed - files)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["from_wheel", "editable", "from_sdist"])
def test_installed_licq_answers_at_once_from_a_users_folder(kind, request, user_folder):
    environment = request.getfixturevalue(kind)
    licq = environment.folder / "bin" / "licq"
    assert environment.run(licq, "--version", cwd=user_folder) == f"licq {__version__}\n"
    assert len(environment.run(licq, "--help", cwd=user_folder).splitlines()) <= 24
    place = environment.folder if kind != "editable" else request.getfixturevalue("source")
    if kind == "editable":  # Python finds packages in folders before an editable install's finder is asked
        (user_folder / "licq").rmdir()
    (user_folder / "light.py").write_text(LIGHT)
    assert Path(environment.run(environment.python, "light.py", cwd=user_folder).strip()).is_relative_to(
        place
    )


@pytest.mark.parametrize(
    "kind",
    [
        "checkout",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("from_wheel", "editable", "from_sdist")),
    ],
)
def test_codec_of_a_users_folder_is_quantized(kind, request, user_folder):
    """The plug-in imports the user's own models/; `checkout`: the scripts of one that is not installed."""
    environment, quantize, evaluate = commands(kind, request)
    flags = ["--arch", "mine.py", "--checkpoint", "weights.txt", "--quality", "1", "--eval", "images"]
    flags += [
        "--calib",
        "calib",
        "--crop",
        "64",
        "--num_calib",
        "2",
        "--crops_per_image",
        "1",
        "--iters",
        "0",
    ]
    for knob in ("joint_iters=0", "balance=0", "split=0", "stress=false", "round_init=nearest"):
        flags += ["--set", knob]
    flags += ["--device", "cpu", "--out", "out", "--quiet"]
    environment.run(*quantize, *flags, cwd=user_folder)
    assert "<html" in (user_folder / "out" / "report.html").read_text()
    assert (user_folder / "out" / "q1" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkout", "from_wheel", "editable", "from_sdist"])
def test_everything_runs_from_a_users_folder(kind, request, user_folder):
    environment, quantize, evaluate = commands(kind, request)
    coding = evaluate if kind == "checkout" else evaluate[:1]
    sweep = [*quantize, "--sweep", "sweep.yaml", "--workers", "2", "--out", "sweep", "--quiet"]
    assert "two runs" in environment.run(*sweep, cwd=user_folder)
    with open(user_folder / "sweep" / "summary.csv") as file:
        assert len(list(csv.DictReader(file))) == 2
    (run,) = sorted(path for path in (user_folder / "sweep" / "runs").iterdir() if "8" in path.name)
    evaluated = [
        "--model",
        run,
        "--data",
        "images",
        "--arch",
        "mine.py",
        "--real",
        "--quiet",
        "--out",
        "eval",
    ]
    environment.run(*evaluate, *evaluated, "--checkpoint", "weights.txt", "--workers", "2", cwd=user_folder)
    assert "<html" in (user_folder / "eval" / "report.html").read_text()
    # An embedded codec, whose files need no plug-in.
    quick = [
        "--set",
        "joint_iters=0",
        "--set",
        "round_init=nearest",
        "--set",
        "split=0",
        "--set",
        "balance=0",
    ]
    quick += [
        "--eval",
        "images",
        "--calib",
        "calib",
        "--crop",
        "64",
        "--num_calib",
        "1",
        "--crops_per_image",
        "1",
    ]
    quick += ["--no-baseline", "--quiet", "--out", "embedded"]
    environment.run(*quantize, "--arch", "balle2018", "--quality", "1", *quick, cwd=user_folder)
    environment.run(*coding, "encode", "images/1.png", "-o", "1.licq", "--model", "embedded", cwd=user_folder)
    environment.run(*coding, "decode", "1.licq", "-o", "1.png", "--model", "embedded", cwd=user_folder)
    assert "96x64" in environment.run(*coding, "info", "1.licq", cwd=user_folder)
    assert (user_folder / "1.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["from_wheel", "editable", "from_sdist"])
def test_python_interface_runs_beside_a_users_packages(kind, request, user_folder):
    environment = request.getfixturevalue(kind)
    if kind == "editable":
        (user_folder / "licq").rmdir()
    assert "decoded" in environment.run(environment.python, "run.py", cwd=user_folder)


def commands(kind: str, request) -> tuple:
    """(environment, the words of quantize, the words of evaluate)."""
    if kind == "checkout":
        environment, source = request.getfixturevalue("bare"), request.getfixturevalue("source")
        return (
            environment,
            [environment.python, source / "main_ptq.py"],
            [environment.python, source / "main_eval.py"],
        )
    environment = request.getfixturevalue(kind)
    licq = environment.folder / "bin" / "licq"
    return environment, [licq, "quantize"], [licq, "evaluate"]
