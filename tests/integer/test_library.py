"""The compiled kernels are those that ctypes expects, and every instruction set gives the same integers."""

import ctypes
import re
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

from licq.integer import library as module
from licq.integer.execution import executable, usable
from licq.integer.fast import FastProgram
from licq.integer.library import compiled_layout, layout_difference, library, mirrored_layout
from licq.integer.lowering import lower
from licq.integer.passes import optimize
from licq.integer.program import Program
from licq.integer.reference import run
from licq.integer.selfcheck import extremes, first_difference
from licq.quant import operations as ops
from licq.quant.operations import Range
from tests.frozen_codecs import frozen
from tests.integer.test_fast import assert_same, needs_kernels, pixels

FOLDER = Path(module.__file__).parent
COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
PLAIN, AVX2, AVX512, VNNI = range(4)  # LICQ_ISA in kernels.h


def build(sources: list[Path], target: Path, *flags: str) -> ctypes.CDLL:
    exact = re.search(r"EXACT = \[(.+)\]", (FOLDER.parent / "setup.py").read_text()).group(1)
    options = [part.strip('" ') for part in exact.split(",")]
    command = [COMPILER, "-shared", "-fPIC", *options, *flags, *map(str, sources), "-lm", "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


# ------------------------------------------------------------------------------------------------ structures


@needs_kernels
def test_the_mirror_is_the_compiled_layout():
    compiled = compiled_layout(library())
    assert compiled == mirrored_layout() and len(compiled) > 140
    assert compiled["Step.rescale"][0] == compiled["Step.store"][0]  # one union
    assert compiled["Step.gdn.scale"] == (module.Step.gdn.offset + module.GdnStep.scale.offset, 8)


def like(structure, fields):
    attributes = {"_fields_": fields, "_anonymous_": getattr(structure, "_anonymous_", ())}
    return type(structure.__name__, (ctypes.Structure,), attributes)


ARRAY, STEP, NORM = (kind._fields_ for kind in (module.Array, module.Step, module.LayerNorm))


@needs_kernels
@pytest.mark.parametrize(
    ("wrong", "difference"),
    [
        (like(module.Step, [*STEP, ("more", ctypes.c_int32)]), "Step"),
        (like(module.Array, [ARRAY[0], ARRAY[2], ARRAY[1]]), "Array.offset"),  # the same size
        (
            like(module.LayerNorm, [(n, ctypes.c_int16 if n == "threads" else kind) for n, kind in NORM]),
            "LayerNorm.threads",  # the same offsets
        ),
    ],
)
def test_kernels_of_other_structures_are_not_used(wrong, difference, monkeypatch):
    structures = [wrong if kind.__name__ == wrong.__name__ else kind for kind in module.STRUCTURES]
    mirrored = mirrored_layout(structures)
    monkeypatch.setattr(module, "mirrored_layout", lambda: mirrored)
    assert layout_difference(library()) == difference
    with pytest.warns(UserWarning, match=re.escape(difference)):
        assert library.__wrapped__() is None


@needs_kernels
def test_kernels_whose_steps_have_other_numbers_are_not_used(monkeypatch):
    monkeypatch.setattr(module, "ADD", module.GDN)
    assert layout_difference(library()) == "ADD"


@needs_compiler
def test_with_an_old_build_the_reference_runs_and_one_line_says_how_to_build(tmp_path, monkeypatch):
    source = tmp_path / "old.c"
    source.write_text("int has_vnni(void) { return 1; }\n")
    build([source], tmp_path / "_kernels.old.so")
    monkeypatch.setattr("licq.support.kernels.FOLDER", tmp_path)
    program = lower(frozen("balle2018"), 64, 64)
    library.cache_clear()
    usable.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            execute, again = executable(program), executable(program)
        assert not isinstance(execute, FastProgram) and not isinstance(again, FastProgram)
        (message,) = messages
        text = str(message.message)
        assert "_kernels.old.so is of another version" in text and "make env or pip install -e ." in text
        assert torch.equal(execute(pixels())["pixels"], run(program, pixels())["pixels"])
    finally:
        monkeypatch.undo()
        library.cache_clear()
        usable.cache_clear()


# ------------------------------------------------------------------------------------------- instruction sets


@pytest.fixture(scope="module", params=["plain", "avx2", "avx512"])
def other_kernels(request, tmp_path_factory):
    """Kernels without the newer instructions, which the installed ones use where the processor has them."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    level = {"plain": PLAIN, "avx2": AVX2, "avx512": AVX512}[request.param]
    target = tmp_path_factory.mktemp("kernels") / f"{request.param}.so"
    return build(sorted(FOLDER.glob("*.c")), target, f"-DLICQ_ISA={level}")


@pytest.fixture
def with_other_kernels(other_kernels, monkeypatch):
    monkeypatch.setattr(module, "library", lambda: other_kernels)
    assert layout_difference(other_kernels) is None and not other_kernels.has_vnni()


def test_every_instruction_set_passes_the_check_at_load(with_other_kernels):
    assert first_difference() is None


@pytest.mark.parametrize("name", ["balle2018", pytest.param("tic", marks=pytest.mark.slow)])
def test_every_instruction_set_gives_the_references_numbers(name, with_other_kernels):
    program = optimize(lower(frozen(name), 64, 64))
    assert_same(program, FastProgram(program), pixels())
    assert_same(program, FastProgram(program, 2), pixels(seed=6))


BYTES = pytest.mark.parametrize("ends", [(-127, 127), (0, 255), (-9, 246)])


@BYTES
@pytest.mark.parametrize("inputs", [1, 3, 16, 33])
def test_every_instruction_set_multiplies_bytes(ends, inputs, other_kernels, monkeypatch):
    """Inputs stored as uint8, which only VNNI is chosen for, and as int16: the largest products and sums."""
    check_bytes(ends, inputs, 21, other_kernels, monkeypatch)


@needs_kernels
@BYTES
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 16), (3, 21), (33, 32), (16, 40), (5, 64)])
def test_the_newest_instruction_set_multiplies_bytes(ends, inputs, outputs, monkeypatch):
    """Of one to four blocks of outputs, which VNNI's kernel takes by twos."""
    check_bytes(ends, inputs, outputs, library(), monkeypatch)


def check_bytes(ends, inputs, outputs, kernels, monkeypatch):
    monkeypatch.setattr(module, "library", lambda: kernels)
    program = Program()
    x = program.input("x", (1, inputs, 7, 13), Range(*ends))
    weight = extremes((outputs, inputs, 3, 3), -128, 127, seed=1).to(torch.int8)
    weight[0], weight[1] = 127, -128
    bound = 255 * 128 * 9 * inputs
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    conv = ops.Conv2d((x,), weight=weight, bias=None, bound=bound, **options)
    program.outputs["out"] = program.add(conv, (1, outputs, 7, 13), Range(-bound, bound))
    given = {"x": extremes((1, inputs, 7, 13), *ends, seed=2).to(program.values[x].dtype)}
    expected = run(program, given)["out"]
    for eight_bits in (False, True):
        says = Says(kernels, eight_bits)
        monkeypatch.setattr("licq.integer.fast.kernels", lambda says=says: says)
        monkeypatch.setattr("licq.integer.group_launch.kernels", lambda says=says: says)
        fast = FastProgram(program)
        assert (fast.storage[x][0] is torch.uint8) == eight_bits
        assert torch.equal(fast(given)["out"], expected)


class Says:
    """Kernels that say whether they have 8-bit instructions, and no Winograd."""

    def __init__(self, kernels, eight_bits):
        self.kernels, self.has_vnni = kernels, lambda: int(eight_bits)
        self.has_winograd = lambda: 0  # which stores 16 bits

    def __getattr__(self, name):
        return getattr(self.kernels, name)
