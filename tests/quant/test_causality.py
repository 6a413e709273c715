"""No symbol reaches a prediction that the decoder needs before it has that symbol: issue 2, item 6.

The quantized codec's own forward runs on a latent y that is put in place of g_a(x), in a batch: the first
image has the plain y, each other one has the symbols of one decoding step at one place changed. The
predictions (means and scales) are what the Gaussian conditional model is handed. g_a, h_a, h_s and g_s, which
see no symbol or the decoded ones only, are replaced by constants.
"""

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor

from licq.models.lu2022 import slice_sizes
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.rounding import ROUNDINGS
from tests.tiny_codecs import tiny_codec

HEIGHT, WIDTH = 6, 7
# cheng2020 has the context model of its anchor; building it takes longer
CONTEXT_MODELS = [
    "minnen2018",
    "cheng2020-anchor",
    "cheng2019",
    "cheng2020",
    "lu2022",
    "tic",
    "chen2021",
]


class Injected:
    """A quantized codec whose transforms return given tensors, with the predictions of its last forward."""

    def __init__(self, name: str, config: QuantConfig, seed: int = 0):
        source = tiny_codec(name, seed)
        self.channels = source.M if hasattr(source, "M") else source.N
        self.steps = decoding_steps(name, self.channels)
        self.quantized = QuantModel(source, config)
        draw = torch.Generator().manual_seed(seed)
        self.y = 4 * torch.randn(1, self.channels, HEIGHT, WIDTH, generator=draw)
        bottleneck = next(module for module in source.modules() if isinstance(module, EntropyBottleneck))
        self.z = torch.randn(1, bottleneck.channels, 2, 2, generator=draw)
        self.params = torch.randn(1, 2 * self.channels, HEIGHT, WIDTH, generator=draw)
        model = self.quantized.model
        # into the instance's own dictionary, where they hide the submodules and methods of these names
        transforms = {
            "g_a": lambda image: self._tensor(self.y, image),
            "h_a": lambda y: self._tensor(self.z.expand(y.shape[0], -1, -1, -1), y),
            "h_s": lambda z_hat: self._tensor(self.params.expand(z_hat.shape[0], -1, -1, -1), z_hat),
            "g_s": lambda y_hat: y_hat[:, :3],
        }
        if name == "chen2021":
            g_a, h_a, h_s, g_s = transforms.values()
            transforms = {
                "encoder": lambda image: (g_a(image), h_a(g_a(image))),
                "hyper_dec": h_s,
                "p": lambda params: params,
                "decoder": g_s,
            }
        for method, replacement in transforms.items():
            object.__setattr__(model, method, replacement)
        self._seen: list[Tensor] = []
        model.gaussian_conditional.register_forward_pre_hook(self._record, with_kwargs=True)
        self.quantized.observe([torch.zeros(1, 3, 8, 8)])

    def _tensor(self, values: Tensor, like: QTensor) -> QTensor:
        """As an accumulator with a scale per channel, or real while the codec is observed."""
        if self.quantized.runtime.observing:
            return like.like(values, None)
        scale = 2.0**-9 * (1 + torch.arange(values.shape[1], dtype=torch.float64)).reshape(1, -1, 1, 1)
        return like.like(torch.round(values / scale).float(), scale)

    def _record(self, module, args, kwargs) -> None:
        predicted = [*args[1:], *(kwargs[key] for key in ("means",) if key in kwargs)]  # (B, k M, H, W) each
        # a mixture's hold several numbers for each symbol; lu2022 asks slice by slice
        components = 3 if len(predicted) == 3 else 1
        self._seen.append(torch.cat([part.real().unflatten(1, (components, -1)) for part in predicted], 1))

    def learn_noise(self, seed: int) -> None:
        """Move everything that reconstruction may learn, as if it had learned."""
        draw = torch.Generator().manual_seed(seed)
        size = {"range_w": 0.05, "range_a": 0.05, "range_b": 0.05, "rounding": 1.0, "bias": 0.1}
        for node in self.quantized.nodes.values():
            for knob, parameters in node.learnable().items():
                for parameter in parameters:
                    parameter.data += size[knob] * torch.randn(parameter.shape, generator=draw)

    @torch.no_grad()
    def predictions(self, y: Tensor) -> Tensor:
        """(B, 2, M, H, W): scales and means; of a mixture nine, with the weights."""
        plain, self.y, self._seen = self.y, y, []
        self.quantized(torch.zeros(y.shape[0], 3, 8, 8))
        self.y = plain
        return torch.cat(self._seen, 2)

    def violations(self) -> tuple[list[str], float]:
        """(predictions that a later symbol moved, share of the changes that moved some later prediction)."""
        draw = torch.Generator().manual_seed(7)
        batch, changed_at = [self.y], [-1]
        for i in range(HEIGHT):
            for j in range(WIDTH):
                for step in self.steps[:, i, j].unique().tolist():
                    together = self.steps[:, i, j] == step
                    changed = self.y.clone()
                    # the symbols of a place that are decoded in one step, each by -9 .. -4 or 4 .. 9
                    amount = 4 + 5 * torch.rand(self.channels, generator=draw)
                    sign = torch.randint(0, 2, (self.channels,), generator=draw) * 2 - 1
                    changed[0, :, i, j] += amount * sign * together
                    batch.append(changed)
                    changed_at.append(step)
        found = self.predictions(torch.cat(batch))
        moved = (found[1:] != found[:1]).any(1)
        wrong, useful = [], 0
        for place, step, where in zip(batch[1:], changed_at[1:], moved):
            too_early = where & (self.steps <= step)
            if bool(too_early.any()):
                symbol = (place[0] != self.y[0]).nonzero()[0].tolist()
                wrong.append(f"{symbol} of step {step} moved {too_early.nonzero()[0].tolist()}")
            useful += bool((where & (self.steps > step)).any())
        followed = sum(step < int(self.steps.max()) for step in changed_at[1:])
        return wrong, useful / followed


def decoding_steps(name: str, channels: int) -> Tensor:
    """(M, H, W): the step in which the decoder gets each symbol."""
    raster = torch.arange(HEIGHT * WIDTH).reshape(1, HEIGHT, WIDTH).expand(channels, -1, -1)
    if name == "chen2021":  # channel by channel
        return raster + HEIGHT * WIDTH * torch.arange(channels)[:, None, None]
    if name != "lu2022":
        return raster
    row, column = torch.arange(HEIGHT)[:, None] % 2, torch.arange(WIDTH)[None, :] % 2
    four_passes = torch.tensor([[0, 2], [3, 1]])[row, column]  # even-even, odd-odd, even-odd, odd-even
    checkerboard = (row + column) % 2
    order = [four_passes, 4 + 1 - checkerboard, 6 + checkerboard, torch.full((HEIGHT, WIDTH), 8)]
    return torch.cat([step.expand(size, HEIGHT, WIDTH) for step, size in zip(order, slice_sizes(channels))])


# every context model, and every rounding
@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        (name, rounding)
        if name != "cheng2020" and (rounding == "adaround" or name == "minnen2018")
        else pytest.param(name, rounding, marks=pytest.mark.slow)
        for name in CONTEXT_MODELS
        for rounding in ROUNDINGS
    ],
)
def test_no_symbol_moves_a_prediction_before_it(name, rounding):
    """While learning and frozen, after every learnable parameter has moved."""
    codec = Injected(name, QuantConfig(rounding=rounding))
    codec.learn_noise(seed=3)
    for state in ("learning", "frozen"):
        if state == "frozen":
            codec.quantized.freeze()
        wrong, useful = codec.violations()
        assert wrong == [], f"{state}: {wrong[:3]}"
        # the context is in use: a codec that ignored it would pass everything above
        assert useful > 0.9, state


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"w_bits": 3, "a_bits": 4}, {"strict_int8": True}, {"a_granularity": "tensor"}]
)
@pytest.mark.parametrize("name", ["minnen2018", "lu2022", "tic"])
def test_causality_holds_at_few_bits_and_with_other_grids(name, options):
    codec = Injected(name, QuantConfig(rounding="learned_offset", **options))
    codec.learn_noise(seed=4)
    codec.quantized.freeze()
    wrong, useful = codec.violations()
    assert wrong == []
    assert useful > 0.5


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["minnen2018", "lu2022"])
def test_masked_weights_are_whole_zeros_under_every_scheme(name, rounding):
    codec = Injected(name, QuantConfig(rounding=rounding))
    codec.learn_noise(seed=5)
    codec.quantized.freeze()
    masked = [node for node in codec.quantized.nodes.values() if getattr(node, "mask", None) is not None]
    assert masked
    for node in masked:
        if node.kind == "conv":
            assert bool((node.weight_int[node.mask == 0] == 0).all())
            assert bool((node.weight_int[node.mask == 1] != 0).any())


def test_the_decoding_order_is_a_partition():
    steps = decoding_steps("lu2022", 16)
    assert steps.shape == (16, HEIGHT, WIDTH) and steps.unique().tolist() == list(range(9))
    # the first slice in four passes, each on one pixel of every 2x2
    assert steps[0, :2, :2].tolist() == [[0, 2], [3, 1]]
