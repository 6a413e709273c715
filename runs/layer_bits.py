"""The flags of single layers: which bits they name, where a search writes them, what a run's settings say of
them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from licq.quant.bits import Bits, check_layers, read_bits
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.errors import InputError
from licq.support.files import writable_folder

BITS = (4, 5, 6, 7, 8)  # candidates of a search


def searches_bits(args: argparse.Namespace) -> bool:
    """Whether the bits of single layers are searched for."""
    return any(value is not None for value in (args.budget_size, args.budget_bops, args.max_bd_rate))


def read_layer_bits(
    args: argparse.Namespace, quality: int, network: nn.Module, several: bool
) -> dict[int, Bits]:
    """{quality: the allocation that --bits_file holds}; nothing where the file is written instead.

    Args:
        network: the float codec; every layer that a flag names must be one of its layers.
        several: the run makes several quantized codecs.

    Raises:
        InputError: a bad file, an unknown layer, or one file to be written for several qualities.
    """
    if args.landscape:
        _check_layers("--landscape", {args.landscape: {}}, network)
    if not args.bits_file:
        return {}
    if searches_bits(args):
        if several and "{quality}" not in args.bits_file:
            raise InputError("--bits_file is written here, for each quality; have {quality} in its name")
        return {}
    path = args.bits_file.replace("{quality}", str(quality))
    bits = read_bits(path)
    _check_layers(f"--bits_file {path}", bits, network)
    return {quality: bits}


def check_float_stages(args: argparse.Namespace, network: nn.Module, quant: QuantConfig) -> None:
    """Raises InputError where `float_stages` leave nothing to quantize, or hold layers of a search for bits.

    A budget would count bits of these layers that they do not have.
    """
    if not quant.float_stages:
        return
    layers = QuantModel(network, quant).layers.values()
    if searches_bits(args) and any(layer.in_float_stage for layer in layers):
        raise InputError(
            f"`float_stages={','.join(quant.float_stages)}` has no bits to search for; give --bits_file "
            "instead of a budget, or --set float_stages="
        )


def check_written_bits(args: argparse.Namespace, qualities: Sequence[int]) -> None:
    """Raises InputError where --bits_file is to be written for these qualities and cannot be."""
    if not (args.bits_file and searches_bits(args)):
        return
    for path in [written_bits_file(args, quality) for quality in qualities]:
        writable_folder(path.parent, "bits_file")
        if path.is_dir():
            raise InputError(f"--bits_file {path} is a folder; give a file's name")


def written_bits_file(args: argparse.Namespace, quality: int) -> Path:
    """The file that --bits_file names for a quality."""
    return Path(args.bits_file.replace("{quality}", str(quality)))


def _check_layers(flag: str, named: Bits, network: nn.Module) -> None:
    try:
        check_layers(named, QuantModel(network, QuantConfig()).layers)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def settings_of_layers(args: argparse.Namespace, bits: Mapping[int, Bits]) -> dict:
    """What run.json's settings say of single layers; nothing where every layer has the same bits."""
    if args.analyze:
        return {"task": "analysis"}
    if searches_bits(args):
        flags = ("budget_size", "budget_bops", "max_bd_rate", "cost")
        asked = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
        return {"bits": asked | {"choices": list(bits_choices(args))}}
    return {"bits": {quality: bits[quality] for quality in sorted(bits)}} if bits else {}


def bits_choices(args: argparse.Namespace) -> Sequence[int]:
    """The candidate bits of a search."""
    return args.bits_choices or BITS
