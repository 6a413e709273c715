"""Tiny codecs, calibrated and frozen, kept for the tests of one file."""

from functools import lru_cache

import pytest
import torch

from licq.quant.config import QuantConfig
from licq.quant.mac import QuantMAC
from licq.quant.model import QuantModel
from tests.tiny_codecs import images, tiny_codec


def frozen(name: str, split: bool = False, **config) -> QuantModel:
    """Not to be changed: others get the same object. split: every third input channel of every layer has two
    digits."""
    return _frozen(name, split, tuple(sorted(config.items())))


@lru_cache(maxsize=32)
def _frozen(name: str, split: bool, config: tuple) -> QuantModel:
    return make_frozen(name, split, **dict(config))


def make_frozen(name: str, split: bool = False, **config) -> QuantModel:
    codec = QuantModel(tiny_codec(name), QuantConfig(**config))
    codec.observe(images(4).split(2))
    if split:
        for node in codec.nodes.values():
            if isinstance(node, QuantMAC) and not node.input_grid.exact and node.kind != "gdn":
                node.input_grid.split(torch.arange(max(node.input_grid.low.numel(), 1)) % 3 == 0)
    codec.freeze()
    return codec


SETTINGS = [
    {"split": True},
    {"w_bits": 4, "a_bits": 4},
    {"strict_int8": True},
    {"w_bits": 16, "a_bits": 16},
    {"w_bits": 8, "a_bits": 16},
    {"a_granularity": "tensor"},
    {"bias_bits": 8},
    {"latent_bits": 8},
    {"scales": "power_of_two", "w_granularity": "groups4", "transform": "smooth"},
    {"softmax": "log2", "transform": "ptf"},
    {"softmax": "log_sqrt2", "softmax_bits": 8, "w_bits": 16, "a_bits": 16, "accumulator_bits": 32},
]
QUICK = ({"split": True}, {"softmax": "log2", "transform": "ptf"})  # also for a codec that is not


def settings() -> list:
    """All of them for a codec that is quick, `QUICK` for one that is not; the rest is slow."""
    quick = [pytest.param("minnen2018", config, id=f"minnen2018-{config}") for config in SETTINGS]
    slow = [
        pytest.param(
            "lu2022", config, id=f"lu2022-{config}", marks=() if config in QUICK else pytest.mark.slow
        )
        for config in SETTINGS
    ]
    return quick + slow
