import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "support" / "version.py").read_text()).group(1)
PACKAGES = ["support", "models", "quant", "reconstruction", "integer", "codec", "data", "evaluation"]

setup(
    name="licq",
    version=VERSION,
    description="Post-training quantization of learned image codecs: integer-exact, rate-distortion-optimized",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(where=str(HERE), include=PACKAGES + [f"{name}.*" for name in PACKAGES]),
    # An editable install with this mapping puts the whole folder on the path: a package added later is found at once.
    package_dir={"": "."},
    py_modules=["main_ptq", "main_eval"],
    package_data={
        "models": ["zoo/*.safetensors", "zoo/README.md"],
        "reconstruction": ["presets/*.yaml"],
        "data": ["*.json"],
        "evaluation": ["*.json"],
    },
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
        "pytorch_msssim",
        "scikit-image",  # for its photographs: `--eval photos` works without a download (data/datasets.json)
    ],
    extras_require={"test": ["pytest", "pytest-xdist", "bjontegaard"]},
)
