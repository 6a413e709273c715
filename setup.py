"""What pyproject.toml cannot say: the version, where packages lie, which files they hold, the C kernels."""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "support" / "version.py").read_text()).group(1)
PACKAGES = [
    "support",
    "workers",
    "data",
    "models",
    "quant",
    "reconstruction",
    "integer",
    "codec",
    "evaluation",
    "report",
    "runs",
    "sweeps",
]

# Neither contraction nor reassociation: the kernels' floating-point steps are exact one by one. Partial sums
# may wrap around.
EXACT = ["-O3", "-std=gnu11", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class BuildKernels(build_ext):
    """The C kernels with threads, else without, else not at all: then the reference runs, slower and with the
    same bits."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception:
            ext.extra_compile_args, ext.extra_link_args = EXACT, []
            super().build_extension(ext)


setup(
    version=VERSION,
    # One import name: in a wheel the folders lie below licq/; in a checkout licq/__init__.py looks beside
    # itself.
    packages=["licq", *(f"licq.{name}" for name in PACKAGES)],
    package_dir={"licq": "licq", **{f"licq.{name}": name for name in PACKAGES}},
    py_modules=["main_ptq", "main_eval"],
    package_data={
        "licq": ["py.typed"],
        "licq.integer": ["*.h"],
        "licq.models": ["zoo/*.safetensors", "zoo/README.md"],
        "licq.reconstruction": ["presets/*.yaml"],
        "licq.data": ["*.json"],
        "licq.evaluation": ["*.json"],
        "licq.report": ["*.j2"],
        "licq.sweeps": ["files/*.yaml"],
    },
    # no Python module: a library that integer/library.py opens
    ext_modules=[
        Extension(
            "licq.integer._kernels",
            sorted(glob("integer/*.c", root_dir=HERE)),
            depends=sorted(glob("integer/*.h", root_dir=HERE)),
            libraries=["m"],
            extra_compile_args=[*EXACT, "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
)
