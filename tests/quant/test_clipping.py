"""What quantizers clip is counted as a loop over the values counts it."""

import pytest
import torch

from licq.evaluation.evaluate import Report, evaluate
from licq.quant.clipping import counting
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.runtime import Runtime
from tests.tiny_codecs import images, tiny_codec


@pytest.fixture(scope="module")
def narrow():
    """A codec whose ranges come from dull images."""
    qmodel = QuantModel(tiny_codec("minnen2018-mean"), QuantConfig())
    qmodel.observe([torch.round((0.4 + 0.2 * images(1)) * 255) / 255])
    qmodel.freeze()
    return qmodel


def test_values_outside_of_the_limits_are_counted_before_they_are_clipped(narrow):
    name = "g_s.2"
    grid, seen = narrow.nodes[name].input_grid, []

    def watch(module, inputs):
        seen.append(inputs[0])

    hook = grid.register_forward_pre_hook(watch)
    with torch.no_grad(), counting(narrow.nodes) as counter:
        narrow(images(2))
    hook.remove()
    scale, low, high, _ = grid.parameters_for(4)
    clipped = values = 0
    for x in seen:
        steps = x.q.double() * (x.scale / scale)
        clipped += int((steps > high + 0.5).sum() + (steps < low - 0.5).sum())
        values += steps.numel()
    assert clipped and counter.shares()[name] == pytest.approx(clipped / values, rel=1e-3)
    assert list(counter.shares().values()) == sorted(counter.shares().values(), reverse=True)
    assert grid.clip_counter is None


def test_real_numbers_are_counted_too():
    grid = Quantizer(8, 24)
    grid.observe(torch.tensor([-1.0, 1.0]))
    grid.initialize()

    class Node:
        def quantizers(self):
            return [grid]

    numbers = QTensor(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 1.1]), None, Runtime(QuantConfig()))
    with counting({"node": Node()}) as counter:
        grid(numbers)
    assert counter.shares() == {"node": pytest.approx(2 / 6)}


def test_an_evaluation_counts_where_it_is_asked_to(narrow):
    pixels = images(2)
    counted = evaluate(narrow, pixels, real=False, count_clipped=True, progress=False)
    plain = evaluate(narrow, pixels, real=False, progress=False)
    filed = evaluate(narrow, pixels, count_clipped=True, progress=False)
    assert filed.clipped == counted.clipped and filed.bpp_source == "bitstream"
    assert plain.clipped is None and counted.clipped and 0 < max(counted.clipped.values()) <= 1
    assert counted.per_image == plain.per_image
    assert Report.from_dict(counted.to_dict()).clipped == counted.clipped
    assert Report.from_dict(plain.to_dict()).clipped is None
