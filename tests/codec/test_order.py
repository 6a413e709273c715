"""The order of decoding against a search through every dependency."""

import numpy as np
import pytest
import torch

from licq.codec.order import Reading, passes, wavefronts
from licq.codec.plan import Plan
from licq.integer.lowering import lower
from licq.quant.operations import Conv2d
from licq.support.errors import InputError
from tests.frozen_codecs import frozen


def causal(side: int, dimensions: int = 2) -> np.ndarray:
    """Taps of a masked kernel: what raster order has before the centre."""
    taps = np.stack(np.meshgrid(*[np.arange(side) - side // 2] * dimensions, indexing="ij"), -1).reshape(
        -1, dimensions
    )
    return taps[: len(taps) // 2]


def reading(taps, known=None, served=None) -> Reading:
    conv = Conv2d(
        (0,),
        (1,),
        weight=torch.zeros(1),
        bias=None,
        bound=0,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
    )
    return Reading(conv, np.asarray(taps), known, served)


def assert_causal(time: np.ndarray, readings: list[Reading]) -> None:
    for position in np.ndindex(*time.shape):
        for read in readings:
            if read.served is not None and not read.served[position]:
                continue
            for tap in read.taps:
                other = tuple(np.add(position, tap))
                inside = all(0 <= o < size for o, size in zip(other, time.shape))
                if inside and (read.known is None or read.known[other]):
                    assert time[other] < time[position]


@pytest.mark.parametrize("side", [3, 5, 7])
def test_wavefronts_of_a_plane(side):
    read = reading(causal(side))
    time = wavefronts(read, (9, 14))
    assert_causal(time, [read])
    rows, columns = np.indices((9, 14))
    np.testing.assert_array_equal(time, columns + (side // 2 + 1) * rows)


def test_wavefronts_of_a_volume():
    read = reading(causal(5, 3))
    time = wavefronts(read, (6, 5, 7))
    assert_causal(time, [read])


@pytest.mark.parametrize("taps", [[[0, 0]], [[0, 1]], [[1, -1]], [[-1, 0], [0, 2]]])
def test_a_tap_on_what_comes_later_is_refused(taps):
    with pytest.raises(InputError, match="decoded later"):
        wavefronts(reading(taps), (4, 4))


def test_passes_of_a_checkerboard():
    even = np.add.outer(np.arange(6), np.arange(7)) % 2 == 0
    cross = [[0, 1], [0, -1], [1, 0], [-1, 0]]
    time = passes([reading(cross, even, ~even)], (6, 7))
    np.testing.assert_array_equal(time, np.where(even, 0, 1))
    assert passes([reading(cross, even, even | True)], (6, 7)).max() == 1
    assert passes([reading(cross)], (6, 7)) is None  # each waits for the other


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("minnen2018", 4 + 3 * 3),
        ("balle2018", 1),
        pytest.param("tic", 4 + 3 * 3, marks=pytest.mark.slow),
        pytest.param("lu2022", 4, marks=pytest.mark.slow),
    ],
)
def test_orders_of_the_codecs_hold_every_position_once(name, most):
    plan = Plan(lower(frozen(name), 64, 64), lambda count: lower(frozen(name), 64, 64))
    for position, latent in enumerate(plan.latents):
        order = plan.order(position)
        assert (
            sorted(np.concatenate(order)) == list(range(latent.shape[2] * latent.shape[3]))
            and len(order) <= most
        )
    assert max(len(plan.order(position)) for position in range(len(plan.latents))) == most


def test_a_decoder_that_looks_ahead_would_be_seen():
    """The numbers that the context model gives at a position do not change with symbols that come later in
    the order."""
    model = frozen("lu2022")
    plan = Plan(lower(model, 64, 64), lambda count: lower(model, 64, 64))
    step = next(step for step in plan.steps if step.context is not None)
    draw = torch.Generator().manual_seed(0)
    shape = step.latent.shape
    inputs = {
        str(number): torch.randint(-5000, 5000, plan.program.values[number].shape, generator=draw).to(
            plan.program.values[number].dtype
        )
        for number in step.context.inputs
    }
    inputs = {
        name: x.clamp(plan.program.values[int(name)].range.low, plan.program.values[int(name)].range.high)
        for name, x in inputs.items()
    }
    decoded = torch.randint(-20000, 20000, shape, generator=draw)

    def densities(values):
        given = {**inputs, **{str(number): values.to(torch.int32) for number in step.context.decoded}}
        results = step.context.run({name: tensor.numpy() for name, tensor in given.items()})
        return {name: torch.from_numpy(array) for name, array in results.items()}

    for earlier, group in enumerate(step.order):
        later = torch.from_numpy(np.concatenate(step.order[earlier:]))
        changed = decoded.flatten(2).clone()
        changed[:, :, later] += 4096
        before, after = densities(decoded), densities(changed.reshape(shape))
        for name in before:
            assert torch.equal(before[name].flatten(2)[:, :, group], after[name].flatten(2)[:, :, group])
