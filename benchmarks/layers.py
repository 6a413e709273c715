"""The table of layers: which kinds are integer, exact and written to files that decode.

Each kind of `layer_kinds` stands in a small codec (convolution, ReLU, kind, convolution, and the same back).
The codec is quantized with the preset `nearest`, saved, loaded again, and writes one image, which the loaded
codec decodes.

    python benchmarks/layers.py [--only KIND ...] [--json docs/results/layer-kinds.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import torch
from compressai.models import FactorizedPrior
from torch import Tensor, nn

from benchmarks.layer_kinds import CHANNELS, KINDS, REFUSED
from licq.codec.api import Codec
from licq.integer.lowering import lower
from licq.integer.reference import run
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.cli import explain

SIDE = 64


class KindCodec(FactorizedPrior):
    """A small codec around two layers of a kind."""

    def __init__(self, kind: str):
        super().__init__(CHANNELS, CHANNELS)
        make = {**KINDS, **REFUSED}[kind]
        c = CHANNELS
        self.g_a = nn.Sequential(nn.Conv2d(3, c, 5, 4, 2), nn.ReLU(), make(), nn.Conv2d(c, c, 3, 2, 1))
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(c, c, 4, 2, 1), nn.ReLU(), make(), nn.ConvTranspose2d(c, 3, 4, 4)
        )


@dataclass
class Outcome:
    """What became of a kind.

    integer: no function stayed in float. exact: program and model agree on every latent and pixel. files: an
    image was written and decoded by the saved model, to the same pixels.
    error: of the float codec's pixels, the root mean square that quantization changes, over their deviation.
    why: what stood against it.
    """

    kind: str
    integer: bool = False
    exact: bool = False
    files: bool = False
    error: float = float("nan")
    why: str = ""


def pictures(count: int, seed: int = 0) -> Tensor:
    """(count, 3, SIDE, SIDE) in 0..1, 8-bit samples, smooth with some noise."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, SIDE // 16, SIDE // 16, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    return ((0.8 * smooth + 0.2 * torch.rand(count, 3, SIDE, SIDE, generator=draw)) * 255).round() / 255


def codec_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    codec = KindCodec(kind)
    with torch.no_grad():
        codec.g_a[0].weight.mul_(3)
        codec.g_a[3].weight.mul_(12)
        codec.g_s[0].weight.mul_(2)
    codec.update()
    return codec.eval()


@torch.no_grad()
def probe(kind: str) -> Outcome:
    """Quantize, lower, save, load, write and decode a codec of this kind."""
    outcome = Outcome(kind)
    try:
        network = codec_of(kind)
        model = QuantModel(network, QuantConfig())
        model.observe(pictures(4).split(2))
        model.freeze()
        coverage = model.coverage()
        outcome.why = ", ".join(sorted({entry["function"] for entry in coverage["kept_in_float"]}))
        outcome.integer = not coverage["kept_in_float"] and not coverage["left_alone"]
        if coverage["left_alone"] and not outcome.why:
            outcome.why = "left alone: " + ", ".join(coverage["left_alone"])
        x = pictures(2, seed=5)
        expected, made = network(x)["x_hat"].clamp(0, 1), model(x)["x_hat"]
        outcome.error = float((made - expected).square().mean().sqrt() / expected.std())
        if coverage["kept_in_float"]:
            return outcome
        program = lower(model, SIDE, SIDE, batch=len(x))
        pixels = run(program, {"pixels": (x * 255).round().to(torch.uint8)})["pixels"]
        outcome.exact = torch.equal(pixels.float() / 255, made)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.safetensors"
            model.save(path)
            saved = QuantModel.load(path, model=codec_of(kind))
            image = (x[0] * 255).round().to(torch.uint8)
            data = Codec(model, bytes(32)).encode(image)
            decoded = Codec(saved, bytes(32)).decode(data)
        outcome.files = torch.equal(decoded.float() / 255, model(x[:1])["x_hat"][0])
    except Exception as error:
        outcome.why = explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return outcome


def stored(outcomes: list[Outcome]) -> dict:
    """The table as `benchmarks/results.py` reads it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    changes = json.loads((ROOT / "docs/results/numbers.json").read_text())["changes"]
    return {
        "title": "Kinds of layers",
        "text": [__doc__.split("\n\n")[1].replace("\n", " ")],
        "settings": {
            "Data": f"noise of {SIDE}x{SIDE}",
            "Bits": "W8A8, nearest",
            "Checkpoint": "random weights",
        },
        "command": ["python benchmarks/layers.py --json docs/results/layer-kinds.json"],
        "measured": {
            "date": date.today().isoformat(),
            "version": version("licq"),
            "numbers": changes[-1]["number"],
            "commit": commit.stdout.strip(),
        },
        "depends": ["integer-kernels"],
        "columns": ["kind", "integer", "exact", "files", "error in percent", "what stays in float"],
        "rows": [
            [
                outcome.kind,
                *("yes" if yes else "no" for yes in (outcome.integer, outcome.exact, outcome.files)),
                f"{100 * outcome.error:.1f}",
                outcome.why,
            ]
            for outcome in outcomes
        ],
        "notes": [
            "Integer: no function stayed in float. Exact: program and simulation agree on every pixel. "
            "Files: an image was written, and decoded by the saved codec to the same pixels. Error: root "
            "mean square of what two layers of a kind change of the pixels, with all else quantized too, "
            "over their deviation."
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="these kinds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = []
    for kind in options.only or [*KINDS, *REFUSED]:
        outcome = probe(kind)
        outcomes.append(outcome)
        marks = "".join("+" if yes else "-" for yes in (outcome.integer, outcome.exact, outcome.files))
        print(f"{marks} {outcome.error:7.4f} {kind:32} {outcome.why[:150]}", flush=True)
    print(f"files: {sum(outcome.files for outcome in outcomes)}")
    if options.json is not None:
        options.json.write_text(json.dumps(stored(outcomes), indent=2) + "\n")


if __name__ == "__main__":
    main()
