"""Processor time of an evaluation: the float codec, the quantized one by its files, and by its simulation.

    python benchmarks/evaluation_times.py --arch lu2022 --quality 3 --data kodak
    python benchmarks/evaluation_times.py --arch minnen2018 --configuration official --data kodak --images 8

Without --configuration the embedded checkpoint is taken, else random weights of that configuration. The codec
is quantized by `nearest` on two crops: time does not depend on the method.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from tabulate import tabulate
from torch import nn

from licq.data.datasets import open_dataset
from licq.evaluation.evaluate import evaluate
from licq.models.checkpoints import embedded_checkpoint, load_checkpoint
from licq.models.registry import create_model
from licq.reconstruction.api import quantize
from licq.reconstruction.config import PtqConfig
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything, set_threads


def network_of(arch: str, quality: int, configuration: str | None) -> nn.Module:
    """The embedded codec, or one with random weights."""
    if configuration is None:
        return load_checkpoint(embedded_checkpoint(arch, quality), arch, quality)
    return create_model(arch, configuration=None if configuration == "official" else configuration).eval()


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", default="lu2022", help="default: lu2022")
    parser.add_argument("--quality", metavar="Q", type=options.positive, default=3, help="default: 3")
    parser.add_argument("--configuration", metavar="NAME", help="such as official; with random weights")
    parser.add_argument("--data", metavar="SET", default="kodak", help="images (default: kodak)")
    parser.add_argument("--images", metavar="N", type=options.positive, help="so many of them (default: all)")
    parser.add_argument("--simulation", action="store_true", help="measure the simulation, too")
    parser.add_argument("--threads", metavar="N", type=options.threads, default=1, help="default: 1")
    args = parser.parse_args()
    set_threads(args.threads)
    seed_everything(0)
    network = network_of(args.arch, args.quality, args.configuration)
    config = PtqConfig.from_preset("nearest")
    qmodel = quantize(network, "photos-calib", config, lmbda=0.01, num_images=2, crop=128, crops_per_image=1)
    images = open_dataset(args.data).paths[: args.images]
    runs = [("float codec", network, False), ("quantized, files", qmodel, True)]
    runs += [("quantized, simulation", qmodel, False)] if args.simulation else []
    rows, first = [], None
    for name, model, real in runs:
        started = time.process_time()
        evaluate(model, images, real=real)
        seconds = time.process_time() - started
        first = first or seconds
        rows.append([name, f"{seconds:.1f} s", f"{seconds / first:.2f}"])
    print(f"{args.arch}, {len(images)} images of {args.data}, {args.threads} thread(s), processor time")
    print(tabulate(rows, ["evaluation of", "time", "of the float codec's"], tablefmt="github"))


if __name__ == "__main__":
    sys.exit(main_guard(main))
