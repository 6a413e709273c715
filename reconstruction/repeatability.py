"""A codec that can have files gives the same numbers for the same image, each time and in any company.

`check_source` looks at the float codec before any work, on two small crops: whether it draws random numbers,
keeps state between images, or mixes the images of a batch. `check_frozen` asks the quantized one at the end,
where equal means equal to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from licq.models.registry import architecture_of, get_architecture
from licq.quant.model import CLEAR_MISMATCH, QuantModel, float_sides
from licq.quant.modules import QuantModule
from licq.quant.outputs import codec_output
from licq.quant.probe import probe
from licq.quant.rewriter import fixed_weights
from licq.reconstruction.recorded import Event, Recorded, first_difference, near, said, tensors_of
from licq.support.errors import InputError
from licq.support.random_numbers import Redrawn, generators, restored

_SIDE = 64  # of the crops, where the codec takes them
_MEND = "the numbers of an image must follow from that image alone, or no decoder can repeat them"


@torch.no_grad()
def check_source(model: nn.Module, crops: Tensor, device: torch.device | str) -> None:
    """Refuse a float codec whose numbers do not follow from the image alone.

    It runs in two copies with different histories. A codec that does not run here is left to later steps,
    which say why.

    Args:
        crops: as `quantize` takes them.

    Raises:
        InputError: it draws random numbers, keeps state, or depends on the batch; the message says where.
    """
    for first, second in _small(model, crops.to(device)):
        with restored(device):
            try:
                codec, fresh = (_Watched(fixed_weights(model).to(device)) for _ in range(2))
                state = generators()
                early = fresh.run(second)
                runs = [codec.run(first), codec.run(first)]
                drew = "Python's or numpy's generator" if generators() != state else ""
                with Redrawn(codec.recorded.where) as redrawn:
                    again = codec.run(first)
                late = codec.run(second)
            except Exception:
                continue
        _refuse_random(runs[1], again, redrawn.drawn)
        where = first_difference(codec.events(runs[0]), codec.events(runs[1]))
        if where is None:
            where = first_difference(fresh.events(early), codec.events(late))
        if where is not None:
            draws = f"it draws from {drew}" if drew else codec.changed()
            raise InputError(
                "the codec gives other numbers for an image when it runs again, or behind another image: "
                f"from {where}{f' ({draws})' if draws else ''}; {_MEND}"
            )
        with restored(device):  # two pairs, for the rounding of a sum may decide in one of them
            mixed = _mixed(model, first, _loud(second)) and _mixed(model, second, _loud(first))
        if mixed:
            raise InputError(
                f"the codec's {mixed[0]} of an image depends on the other images of its batch, from "
                f"{mixed[1]} on (a mean over the batch?); {_MEND}"
            )
        return


@torch.no_grad()
def check_frozen(model: QuantModel, crops: Tensor) -> dict[str, Any]:
    """Refuse a frozen codec that computes other pixels the second time, or in a batch.

    Args:
        crops: as `quantize` takes them.

    Returns:
        What the model's file says of it: {"height", "width"} of the crops, "exact": whether equal means to
        the bit, as it does where nothing is in float, and then "pixels", see `quant.probe`.

    Raises:
        InputError: the pixels differ; the message names the first node whose numbers do.
    """
    exact = not (model.runtime.kept_in_float or any(map(_is_real, model.nodes.values())))
    for first, second in _small(model.model, crops):
        pair = torch.cat([first, _loud(second)])
        with restored(first.device):
            try:
                alone, again, together = (model(x)["x_hat"] for x in (first, first, pair))
            except Exception:  # there it takes another path than in calibration
                if first.shape == crops[:1].shape:
                    raise
                continue
            for how, x, pixels in (("the second time", first, again), ("in a batch", pair, together)):
                if not (torch.equal(alone, pixels[:1]) if exact else not _clearly_differ(alone, pixels[:1])):
                    raise InputError(
                        f"the quantized codec computes other pixels for the same image {how}, from "
                        f"{_first_node(model, first, x)} on; {_MEND}"
                    )
        size = first.shape[-2], first.shape[-1]
        found = {"height": size[0], "width": size[1], "exact": exact}
        has_one_rate = not hasattr(model.model, "rate")
        return found | ({"pixels": probe(model, *size)} if exact and has_one_rate else {})
    return {}


def _is_real(node: QuantModule) -> bool:
    """Whether the node sums real numbers: the last bits of such sums depend on the size of a batch."""
    return bool(float_sides(node)) or node.stays_float or node.config.is_simulated


def _small(model: nn.Module, crops: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two different crops (1, C, H, W), as small as the codec may take them, then larger, at last whole."""
    made = architecture_of(model)
    side = max(_SIDE, get_architecture(made[0]).multiple) if made else _SIDE
    second = crops[1:2] if len(crops) > 1 else crops[:1].flip(-1)
    sides = [size for size in (side, 2 * side) if size < max(crops.shape[-2:])]
    for size in (*sides, max(crops.shape[-2:])):
        yield crops[:1, :, :size, :size], second[:, :, :size, :size]


def _clearly_differ(a: Tensor, b: Tensor) -> bool:
    """Whether more differs than latents that are rounded to the other side make differ; see
    `QuantModel.observe`."""
    return a.shape != b.shape or bool((a - b).abs().median() > CLEAR_MISMATCH * b.std(correction=0) + 1e-3)


def _first_node(model: QuantModel, a: Tensor, b: Tensor) -> str:
    """The first node whose output for the first image differs."""
    records = []
    for x in (a, b):
        with model.runtime.recording() as record:
            model(x)
        records.append({call: tensors_of(output) for call, output in record.items()})
    for call, outputs in records[0].items():
        others = records[1].get(call)
        if others is None or not all(near(one, other[: len(one)]) for one, other in zip(outputs, others)):
            return call[0]
    return "its output"


def _refuse_random(
    expected: Mapping[str, Tensor], redrawn: Mapping[str, Tensor], drawn: Sequence[tuple[str, str]]
) -> None:
    if drawn and not all(near(values, redrawn[name]) for name, values in expected.items()):
        what, where = drawn[0]
        raise InputError(
            f"the codec draws random numbers in evaluation ({what} in {where}), and its output depends on "
            f"them; {_MEND}. Let it draw them in training alone: `if self.training`"
        )


def _loud(crop: Tensor) -> Tensor:
    """Noise of 0 and 1 in the place of a crop (1, C, H, W): company that no statistics overlook."""
    drawn = torch.rand(crop[:, :3].shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([(drawn > 0.5).to(crop), crop[:, 3:]], 1)


def _mixed(model: nn.Module, first: Tensor, second: Tensor) -> tuple[str, str] | None:
    """(the output that depends on the company of an image, where it first shows); None: there is none.

    In float64, where hardly a latent lies so near to the middle between two integers that the rounding of
    sums, which differs with the batch, decides. A codec that only runs in float32 must differ clearly.
    """
    for dtype, differ in ((torch.float64, _differ), (torch.float32, _clearly_differ)):
        try:
            codec = _Watched(fixed_weights(model).to(first.device, dtype))
            each = [codec.run(x.to(dtype)) for x in (first, second)]
            together = codec.run(torch.cat([first, second]).to(dtype))
        except Exception:
            continue
        for index, alone in enumerate(each):
            for name, values in alone.items():
                part = _part(together.get(name), index)
                if part is not None and part.shape == values.shape and differ(values, part):
                    parts = [
                        (kind, module, [_part(tensor, index) for tensor in tensors])
                        for kind, module, tensors in codec.events(together)
                    ]
                    return name, first_difference(codec.events(alone), parts) or said("")
        return None
    return None


def _part(tensor: Any, index: int) -> Any:
    """The first or second half of what a batch of two gives."""
    return (
        tensor.chunk(2)[index] if isinstance(tensor, Tensor) and tensor.ndim and len(tensor) > 1 else tensor
    )


def _differ(a: Tensor, b: Tensor) -> bool:
    return not near(a, b)


class _Watched:
    """A copy of a float codec, and what its modules computed in each run."""

    def __init__(self, network: nn.Module):
        self.network: Any = network
        self.recorded = Recorded(network)
        self._events: dict[int, list[Event]] = {}
        self._before: dict[str, Any] = {}

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs by name: "x_hat" and "likelihoods y"."""
        if x.shape[1] > 3:
            self.network.rate = x[:, 3:4, :1, :1]
        self._before = self.recorded.state()
        with self.recorded.running() as events:
            output = codec_output(self.network(x[:, :3].clone()))
        named = {"x_hat": output["x_hat"]}
        named |= {f"likelihoods {name}": values for name, values in output["likelihoods"].items()}
        self._events[id(named)] = [*events, ("out", "", list(named.values()))]
        return named

    def events(self, outputs: dict[str, Tensor]) -> list[Event]:
        """What happened in the run with these outputs."""
        return self._events[id(outputs)]

    def changed(self) -> str:
        """The buffers and attributes that the last run has changed, in words; empty where there are none."""
        after = self.recorded.state()
        names = [name for name, value in after.items() if value != self._before.get(name, value)]
        return f"its {', '.join(names[:3])} changed" if names else ""
