import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
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
    name="licq",
    version=VERSION,
    description="Post-training quantization of learned image codecs: integer-exact, rate-distortion-optimized",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    # One import name: in a wheel the folders lie below licq/; in a checkout licq/__init__.py looks beside
    # itself.
    packages=["licq", *(f"licq.{name}" for name in PACKAGES)],
    package_dir={"licq": "licq", **{f"licq.{name}": name for name in PACKAGES}},
    py_modules=["main_ptq", "main_eval"],
    package_data={
        "licq.integer": ["kernels.h"],
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
            ["integer/kernels.c", "integer/winograd.c"],
            depends=["integer/kernels.h"],
            libraries=["m"],
            extra_compile_args=[*EXACT, "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.4",
        "torchvision",
        "compressai>=1.2.8",
        "timm>=1.0",
        "numpy",
        "scipy",
        "pillow",
        "safetensors",
        "tqdm",
        "pyyaml",
        "matplotlib",
        "tabulate",
        "jinja2",
        "pytorch_msssim",
        "scikit-image",  # for its photographs: `--eval photos` works without a download (data/datasets.json)
    ],
    extras_require={
        "ray": ["ray>=2.9"],  # sweeps and evaluations on a cluster; docs/sweeps.md
        "test": ["pytest", "pytest-xdist", "bjontegaard", "ray>=2.9"],
        "bench": [
            "onnx",
            "onnxscript",
            "onnxruntime",
            "openvino",
            "nncf",
        ],  # what benchmarks/peers.py compares with
    },
)
