"""The best way to run a program on this machine."""

import os
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from licq.integer.fast import FastProgram
from licq.integer.library import library
from licq.integer.passes import optimize
from licq.integer.program import Program
from licq.integer.reference import run
from licq.integer.selfcheck import first_difference

Executable = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether there are compiled kernels and they give the reference's numbers here; checked once.

    The environment variable LICQ_KERNELS=reference says no.
    """
    if os.environ.get("LICQ_KERNELS") == "reference" or library() is None:
        return False
    different = first_difference()
    if different is not None:
        warnings.warn(
            f"the compiled kernel of {different} is wrong on this processor; the slower reference runs, with "
            "the same bits",
            stacklevel=2,
        )
    return different is None


def _by_name(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {str(name): tensor for name, tensor in run(program, inputs).items()}


def executable(
    program: Program, threads: int | None = None, device: torch.device | str = "cpu"
) -> Executable:
    """What computes a program: integers by name -> integers by name.

    On the CPU the compiled kernels where they can be used; else the reference.

    threads: of the kernels; None: PyTorch's.
    """
    if torch.device(device).type == "cpu" and usable():
        return FastProgram(optimize(program), threads)
    return partial(_by_name, program.to(device))


def on_arrays(
    program: Program, threads: int | None = None
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """What computes a program on the CPU, on NumPy's arrays; see `executable`.

    Returns:
        With kernels a `ready.ReadyProgram`.
    """
    run = executable(program, threads)
    if isinstance(run, FastProgram):
        run.ready.threads = threads or torch.get_num_threads()
        return run.ready

    def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = run({name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in results.items()}

    return compute
