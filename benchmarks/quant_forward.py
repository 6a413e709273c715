"""How long the quantized forward takes, against the float forward of the same codec.

    python benchmarks/quant_forward.py --arch lu2022 --size 512 --mode frozen

Weights and image are random; the time does not depend on them. Prints milliseconds of processor time for one
image, the fastest of --repeat runs, and the ratio to float. With one thread that is elapsed time without what
other programs took. The mode `learn` is a forward and a backward, of both codecs.
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch

from licq.models import create_model
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything, set_threads


def best_ms(run: Callable[[], object], repeat: int) -> float:
    """Milliseconds of the fastest of `repeat` runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def forward_backward(
    model: torch.nn.Module, x: torch.Tensor, parameters: list[torch.nn.Parameter]
) -> Callable[[], None]:
    """One step of learning: the gradient of distortion plus rate for these parameters."""

    def run() -> None:
        output = model(x)
        rate = -sum(likelihood.log().sum() for likelihood in output["likelihoods"].values())
        (rate + (output["x_hat"] - x).square().sum()).backward()
        for parameter in parameters:
            parameter.grad = None

    return run


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", default="lu2022")
    parser.add_argument(
        "--configuration", default="reference", help="widths: reference, or official for the paper's"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the square image, a multiple of 64")
    parser.add_argument("--batch", type=options.positive, default=1)
    parser.add_argument("--mode", choices=("float", "frozen", "learn"), default="frozen")
    parser.add_argument("--threads", type=options.threads, default=1)
    parser.add_argument("--repeat", type=options.positive, default=3)
    parser.add_argument("--profile", action="store_true", help="print the operators that took longest")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    seed_everything(0)

    configuration = None if arguments.configuration == "official" else arguments.configuration
    model = create_model(arguments.arch, configuration=configuration).eval()
    x = torch.rand(arguments.batch, 3, arguments.size, arguments.size).mul(255).round() / 255
    learning = arguments.mode == "learn"
    parameters = list(model.parameters())
    run_float = forward_backward(model, x, parameters) if learning else torch.no_grad()(lambda: model(x))
    float_ms = best_ms(run_float, arguments.repeat)
    print(f"float {float_ms / arguments.batch:.0f} ms per image")
    if arguments.mode == "float":
        return

    quantized = QuantModel(model, QuantConfig())
    quantized.observe([x[:1]])
    quantized.quantize_nodes(True)
    if learning:
        parameters = [
            p for node in quantized.nodes.values() for knob in node.learnable().values() for p in knob
        ]
        for parameter in parameters:
            parameter.requires_grad_(True)
        run = forward_backward(quantized, x, parameters)
    else:
        quantized.freeze()
        run = torch.no_grad()(lambda: quantized(x))
    if arguments.profile:
        run()
        with torch.profiler.profile() as profile:
            run()
        print(
            profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50
            )
        )
    quantized_ms = best_ms(run, arguments.repeat)
    ratio = quantized_ms / float_ms
    print(f"{arguments.mode} {quantized_ms / arguments.batch:.0f} ms per image, {ratio:.2f} x float")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    sys.exit(main_guard(main))
