"""How many pixels a tile of a large image needs around those that it computes, as a Markdown table.

python benchmarks/reach_table.py --arch balle2018 minnen2018 lu2022
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

import torch
from tabulate import tabulate

from licq.codec.plan import Plan
from licq.codec.sizes import Sizes, analysis_part
from licq.integer.lowering import lower
from licq.models.registry import create_model, get_architecture
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.cli import ArgumentParser, main_guard
from licq.support.determinism import seed_everything

HEADS = ["codec", "analysis: before, after", "synthesis: before, after", "tiles begin at multiples of"]


def row(arch: str, configuration: str | None) -> list[str]:
    """The line of an architecture."""
    seed_everything(0)
    model = QuantModel(create_model(arch, None, configuration).eval(), QuantConfig())
    model.observe([torch.rand(1, 3, 128, 128)])
    model.freeze()
    multiple = get_architecture(arch).multiple
    sizes = Sizes(lambda height, width, batch: lower(model, height, width, batch), multiple)
    plan = Plan(lower(model, multiple, multiple), sizes)
    analysis, synthesis = (
        sizes.reach("analysis", analysis_part),
        sizes.reach("synthesis", plan.synthesis_of),
    )
    if analysis is None or synthesis is None:
        return [arch, "the whole image", "the whole image", "-"]
    reaches = (analysis, synthesis)
    return [
        arch,
        *(f"{reach.rows.before}, {reach.rows.after}" for reach in reaches),
        str(max(reach.rows.period for reach in reaches)),
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arch", nargs="+", required=True)
    parser.add_argument(
        "--configuration", default="reference", help="reference or official (default: reference)"
    )
    args = parser.parse_args()
    rows = [row(arch, None if args.configuration == "official" else args.configuration) for arch in args.arch]
    print(tabulate(rows, HEADS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main_guard(main))
