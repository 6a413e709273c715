"""Distributions of the project, and fresh environments to install them in."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "site", "docs", "tests"
)
ROOMS = ("models", "data", "quant", "codec", "evaluation", "support")  # names that a user's packages have too


@dataclass(frozen=True)
class Environment:
    """A Python environment of its own with everything that licq needs, without licq."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        found = self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        return Path(found.strip())

    def install(self, *words: object) -> None:
        """pip of the tests' environment, for this one; no network."""
        self.run(
            *(sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index"),
            *("--no-deps", "--no-build-isolation", "--disable-pip-version-check", *words),
        )

    def run(self, *words: object, cwd: Path | None = None, status: int = 0) -> str:
        """What the command says on standard output, after it ended with `status`; nothing of the tests'
        environment goes along."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd or self.folder,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": str(self.folder),
                "OMP_NUM_THREADS": "1",
                "LICQ_CACHE": "no-cache",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout's sources: what builds leave behind stays there."""
    folder = tmp_path_factory.mktemp("source") / "checkout"

    def left_out(path: str, names: list[str]) -> set[str]:
        results = (
            {name for name in names if (Path(path) / name).is_dir()} if path.endswith("/runs") else set()
        )
        return _LEFT_OUT(path, names) | results

    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    return _built("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def wheel_without_kernels(source, tmp_path_factory) -> Path:
    """As on a machine that has no C compiler: built in a second or two."""
    return _built("build_wheel", source, tmp_path_factory.mktemp("without_kernels"), CC="false")


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory) -> Path:
    return _built("build_sdist", source, tmp_path_factory.mktemp("sdist"))


def _built(what: str, source: Path, folder: Path, **variables: str) -> Path:
    """What pip has setuptools do, with the setuptools that is installed here."""
    code = f"import sys; from setuptools import build_meta; build_meta.{what}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=source,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="session")
def heavy(tmp_path_factory) -> Path:
    """A folder with links to every package that is installed here but licq: on the path of an environment
    it shares them, and an editable licq's finder stays out."""
    folder = tmp_path_factory.mktemp("heavy")
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    for packages in map(Path, sorted(installed)):
        for path in packages.iterdir() if packages.is_dir() else ():
            ours = path.name.startswith(("licq", "main_ptq", "main_eval", "__editable__", "__pycache__"))
            if not ours and path.suffix != ".pth" and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def make_environment(heavy, tmp_path_factory):
    """A function that makes an `Environment`."""

    def make(name: str) -> Environment:
        environment = Environment(tmp_path_factory.mktemp(name))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
        (environment.packages / "heavy.pth").write_text(f"{heavy}\n")
        return environment

    return make


@pytest.fixture(scope="session")
def from_wheel(make_environment, wheel) -> Environment:
    environment = make_environment("from_wheel")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def from_sdist(make_environment, sdist) -> Environment:
    environment = make_environment("from_sdist")
    environment.install(sdist)
    return environment


@pytest.fixture(scope="session")
def editable(make_environment, source) -> Environment:
    environment = make_environment("editable")
    environment.install("--editable", source)
    return environment


@pytest.fixture(scope="session")
def bare(make_environment) -> Environment:
    """Without licq: for the scripts of a checkout."""
    return make_environment("bare")


NETWORK = """
    from compressai.entropy_models import EntropyBottleneck
    from torch import nn

    class Network(nn.Module):
        def __init__(self, N: int = 4):
            super().__init__()
            self.N = N
            self.g_a = nn.Conv2d(3, N, 4, 4)
            self.entropy_bottleneck = EntropyBottleneck(N)
            self.g_s = nn.ConvTranspose2d(N, 3, 4, 4)

        def forward(self, x):
            y_hat, likelihoods = self.entropy_bottleneck(self.g_a(x))
            return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}

        def update(self):
            self.entropy_bottleneck.update()
"""
PLUGIN = """
    import torch
    from models.network import Network
    import licq

    def load(path, quality):
        torch.manual_seed(quality)
        network = Network()
        network.g_a.weight.data.mul_(20)
        network.update()
        return network.eval()

    licq.register_model("mine", Network, official={1: {"N": 4}}, configurations={"reference": {"N": 4}},
                        multiple=4, lambdas={"mse": {1: 0.01}}, loader=load)
"""
SCRIPT = """
    import data, quant, codec, evaluation, support
    import licq
    import torch
    from mine import load
    from models.network import Network

    assert data.MINE and quant.MINE and codec.MINE and evaluation.MINE and support.MINE
    crops = licq.sample_crops(["images/1.png", "images/2.png"], num=2, crop=64)
    config = licq.PtqConfig.from_preset("licq", joint_iters=0)
    qmodel = licq.quantize(load(None, 1), crops, config, lmbda=0.01, progress=False)
    print(licq.evaluate(qmodel, "images", pad=4, progress=False).mean())
    qmodel.save("mine.safetensors")
    coder = licq.Codec(licq.QuantModel.load("mine.safetensors", model=Network()), bytes(8), multiple=4)
    pixels = (crops[0] * 255).round().to(torch.uint8)
    file = coder.encode(pixels)
    assert torch.equal(coder.decode(file), (qmodel(crops[:1])["x_hat"][0] * 255).round().to(torch.uint8))
    print("decoded", len(file), "bytes")
"""
SWEEP = """
    title: two runs
    flags: {arch: mine.py, checkpoint: weights.txt, quality: 1, eval: images, calib: calib, crop: 64,
            num_calib: 2, crops_per_image: 1, iters: 0, device: cpu, set: {joint_iters: 0}}
    grid: {w_bits: [8, 6]}
"""


@pytest.fixture
def user_folder(tmp_path, make_image, request) -> Path:
    """A user's repository: packages of the names of the project's rooms, a plug-in, a script, images, and a
    clone of licq's repository (or what else is called licq and is no package)."""
    folder = tmp_path / "user"
    for room in ROOMS:
        (folder / room).mkdir(parents=True)
        if room != "models":  # which is a namespace package: nothing marks it as one
            (folder / room / "__init__.py").write_text("MINE = True\n")
    (folder / "licq").mkdir()
    for seed in (1, 2):
        make_image(f"{seed}.png", 96, 64, seed, folder / "images")
        make_image(f"{seed}.png", 80, 72, seed + 10, folder / "calib")
    files = {"models/network.py": NETWORK, "mine.py": PLUGIN, "run.py": SCRIPT, "sweep.yaml": SWEEP}
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    (folder / "weights.txt").write_text("the plug-in's loader needs none\n")
    (folder / "main_ptq.py").write_text("raise SystemExit('the wrong main_ptq')\n")
    return folder
