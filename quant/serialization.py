"""Quantized models in files: the frozen integer program as safetensors, and back.

The file holds what the program reads and nothing else: whole-number weights and biases, scales, ranges,
tables, multipliers, the entropy models, and the parameters of what stayed in float. Float weights that became
whole numbers are not in it. Whole numbers are stored in the smallest integer type that holds them, many of
less than eight bits packed, tables of functions as the steps between their entries, and all is compressed.
The header's JSON says how to rebuild the program around the codec's own forward; a SHA-256 seals tensors and
header.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from licq.models.checkpoint_files import CDF_STATE, QUANTIZED_FORMAT, pack_cdfs, read_tensors, write_tensors
from licq.models.registry import architecture_of, create_network, list_models
from licq.quant.boundaries import QuantGaussianConditional, QuantVariableBottleneck
from licq.quant.config import QuantConfig
from licq.quant.file_checks import wrong_numbers
from licq.quant.grid import Grid
from licq.quant.mac import QuantMAC
from licq.quant.modules import QuantModule
from licq.quant.norms import QuantLayerNorm
from licq.quant.packing import bits_needed, pack, unpack
from licq.quant.rounding import AdaRound
from licq.support.errors import InputError

if TYPE_CHECKING:
    from licq.quant.model import QuantModel

VERSION = 4
_READ = (3, 4)
EXACT_FLOAT64 = 2**53  # whole numbers below this are exact in float64
_FEW = 64  # so many whole numbers are not worth packing
_TABLES = ("table", "cumulative")  # names of functions' tables, along the last dimension
_SMALL = (torch.int8, torch.int16, torch.int32)
_GRID_FACTS = ("bits", "channel_dim", "fixed", "pixels")


def save_quantized(model: "QuantModel", path: str | Path, extra: Mapping[str, Any] | None = None) -> int:
    """Write a frozen model, whole or not at all; returns the size of the file in bytes.

    Args:
        extra: what the writer wants to find again (quality, lambda, history ...), anything that JSON can
        hold.

    Raises:
        InputError: the model is not frozen, or the file cannot be written.
    """
    if not model.frozen:
        raise InputError(
            "only a frozen model is a program that can be saved; call freeze() after calibration"
        )
    make_tables(model)
    unread, constants, once = unread_tensors(model), _constants(model), dict(_tensors(model))
    kept = {
        name: tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if name in once and name not in unread and name not in constants and tensor.numel()
    }
    tensors, types, packed, steps = {}, {}, {}, []
    for name, tensor in pack_cdfs(kept).items():
        tensors[name] = _smallest(tensor)
        if tensors[name].dtype != tensor.dtype:
            types[name] = _type_name(tensor.dtype)
        if name.rpartition(".")[2] in _TABLES and tensors[name].dtype in _SMALL:
            tensors[name] = _smallest(
                tensors[name].long().diff(prepend=torch.zeros(*tensor.shape[:-1], 1, dtype=torch.int64))
            )
            types[name] = _type_name(tensor.dtype)
            steps.append(name)
        elif (
            tensors[name].dtype == torch.int8
            and tensor.numel() > _FEW
            and (bits := bits_needed(tensors[name])) < 8
        ):
            tensors[name], packed[name] = pack(tensors[name], bits), [bits, list(tensor.shape)]
    # through JSON and back, so that the seal is on what a reader will see
    content = {
        "types": types,
        "packed": packed,
        "steps": steps,
        "constants": sorted(constants),
        "extra": dict(extra or {}),
    }
    header = json.loads(json.dumps({**_description(model), **content}))
    write_tensors(path, tensors, {**header, "sha256_header": _seal(header)}, compress=True)
    return Path(path).stat().st_size


def load_quantized(
    path: str | Path, network: nn.Module | None = None, device: torch.device | str | None = None
) -> "QuantModel":
    """The frozen model of a file; its forward gives the bits that the saved model gave. `extra` is its
    attribute.

    Args:
        network: for a codec that no `--arch` names: a new object of the codec's class. Its weights do not
        matter.

    Raises:
        InputError: no such file, damaged, not a quantized model, of another version, or of another network.
    """
    from licq.quant.model import QuantModel  # which imports this file for its `save` and `load`

    header, tensors = read_quantized(path)
    try:
        model = QuantModel(_network(path, header, network), QuantConfig(**header["config"]))
        _rebuild(model, header, path)
        _fill(model, tensors, set(header["constants"]), path)
        _complete(model, header, path)
        for name, node in model.nodes.items():
            if (problem := wrong_numbers(node)) is not None:
                raise InputError(f"{path}: {name}: {problem}; quantize the codec again")
        check_certificates(model, path)
        model.extra = header["extra"]
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"{path} does not describe a program of this version ({error!r}); quantize the codec again"
        ) from error
    model.frozen = model.loaded = True
    return model if device is None else model.to(device)


def check_certificates(model: "QuantModel", path: str | Path) -> None:
    """Every layer's accumulator bound, which the file states, holds for the weights that it has (design,
    section 4).

    Raises:
        InputError: a sum can exceed its bound, or what float64 holds exactly.
    """
    for name, node in model.nodes.items():
        if isinstance(node, QuantMAC) and node.weight_int is not None:
            largest = float(node.accumulator_bound(node.weight_int, node.bias_int))
            if not largest <= float(node.bound) or largest >= EXACT_FLOAT64:
                raise InputError(
                    f"{path}: sums in {name} can reach {largest:.0f}, and the file certifies {float(node.bound):.0f}; quantize the codec again"
                )


def read_quantized(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors in the types that the program uses) of a quantized model's file, verified.

    The header's keys: arch, kwargs, class, config, functions, order, grids, kept_in_float, left_alone, extra
    ...

    Raises:
        InputError: no such file, damaged, not a quantized model, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no quantized model at {path}; give a file that main_ptq.py has written with --model"
        )
    tensors, header = read_tensors(path)
    if header.get("format") != QUANTIZED_FORMAT:
        raise InputError(
            f"{path} is no quantized model but a float checkpoint; quantize it: main_ptq.py --checkpoint {path}"
        )
    if header.get("version") not in _READ:
        raise InputError(
            f"{path} has version {header.get('version')} of the format, this program reads {VERSION}; quantize the codec again"
        )
    if header.pop("sha256_header", None) != _seal(header):
        raise InputError(
            f"{path} is damaged (its header does not have the SHA-256 that it states); copy or make it again"
        )
    try:
        return header, _unpacked(header, tensors)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise InputError(f"{path} is damaged ({error!r}); copy or make it again") from error


def _unpacked(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in the types that the program uses, as the header says."""
    for name, (bits, shape) in header["packed"].items():
        if name in tensors:
            tensors[name] = unpack(tensors[name], bits, tuple(shape))
    for name in header.get("steps", ()):
        if name in tensors:
            tensors[name] = tensors[name].long().cumsum(-1)
    for name, stated in header["types"].items():
        if name in tensors:  # CDF tables are unpacked by now, under their own names and in their own type
            dtype = getattr(torch, stated)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{stated} is no type")
            tensors[name] = tensors[name].to(dtype)
    return tensors


def unread_tensors(model: "QuantModel") -> set[str]:
    """Names of the tensors that the frozen program never reads: float weights, ranges in the making, learned
    factors."""
    ran = {id(node) for node in model.nodes.values()}
    unread: set[str] = set()

    def drop(path: str, module: nn.Module, *names: str) -> None:
        own = {name for name, _ in _tensors(module)}
        for start in names:
            unread.update(f"{path}.{name}" for name in own if name == start or name.startswith(f"{start}."))

    for path, module in model.named_modules():
        if isinstance(module, QuantMAC):
            if module.weight_int is not None:
                drop(path, module, "module", "weight_quantizer", "log_n_bias", "bias_change")
            elif id(module) not in ran:
                unread.update(f"{path}.{name}" for name, _ in _tensors(module))
        elif isinstance(module, QuantGaussianConditional) and module.normal is not None:
            drop(
                path, module, *(f"module.{name}" for name in CDF_STATE)
            )  # its symbols are coded with `density`
        elif isinstance(module, QuantVariableBottleneck) and module.cumulative is not None:
            drop(path, module, *(f"module.{name}" for name in CDF_STATE))  # with `cumulative`
        elif isinstance(module, QuantLayerNorm) and module.offset is not None:
            drop(path, module, "module")
        elif isinstance(module, Grid):
            final = ("scale", "qmin", "qmax") if module.fixed is not None or module.bits == 32 else ()
            drop(path, module, "low", "high", "energy", "log_n", *final)
    return unread


# ----------------------------------------------------------------------------------------------------- saving


def _description(model: "QuantModel") -> dict[str, Any]:
    known = architecture_of(model.model)
    functions = []
    for key, node in model.functions.items():
        functions.append([key.replace("/", "."), node.kind, node.options])
    return {
        "format": QUANTIZED_FORMAT,
        "version": VERSION,
        "arch": known[0] if known else None,
        "kwargs": known[1] if known else None,
        "class": type(model.model).__qualname__,
        "sizes": _sizes(model),
        "config": model.config.to_dict(),
        "configs": {
            name: n.config.to_dict() for name, n in _nodes(model).items() if n.config != model.config
        },
        "functions": functions,
        "order": [[name, node.calls] for name, node in model.nodes.items()],
        "float_nodes": [name for name, node in _nodes(model).items() if not node.quantized],
        "grids": {path: [getattr(grid, fact) for fact in _GRID_FACTS] for path, grid in _grids(model)},
        "roundings": {
            name: [node.weight_quantizer.rounding_name, node.weight_quantizer.rounding.hardened]
            for name, node in model.nodes.items()
            if isinstance(node, QuantMAC)
            and node.weight_int is None
            and node.weight_quantizer.rounding is not None
        },
        "kept_in_float": [[*place, calls] for place, calls in model.runtime.kept_in_float.items()],
        "left_alone": model.rewrite.left_alone,
    }


def make_tables(model: "QuantModel") -> None:
    """CDF tables are part of the model: made here once, never by whoever decodes (design, section 4)."""
    empty = any(
        t.numel() == 0 for name, t in model.state_dict().items() if name.rpartition(".")[2] in CDF_STATE
    )
    if empty and callable(getattr(model.model, "update", None)):
        model.model.update()


def _constants(model: "QuantModel") -> set[str]:
    """Buffers that the constructor of a registered codec gives to every network: attention masks, bounds,
    indices."""
    known = architecture_of(model.model)
    if known is None:
        return set()
    from licq.quant.model import QuantModel

    fresh = dict(QuantModel(create_network(*known), model.config).model.named_buffers())
    return {
        f"model.{name}"
        for name, buffer in model.model.named_buffers()
        if name in fresh
        and buffer.numel()
        and name.rpartition(".")[2] not in CDF_STATE
        and (buffer.dtype, buffer.shape) == (fresh[name].dtype, fresh[name].shape)
        and _same_bits(buffer.cpu().contiguous(), fresh[name].contiguous())
    }


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor in the smallest integer type from which every bit comes back, or as it is; contiguous."""
    tensor = tensor.contiguous()
    if tensor.dtype in (torch.float32, torch.float64, torch.int64, torch.int32):
        for dtype in _SMALL:
            small = tensor.to(dtype)
            if dtype.itemsize < tensor.dtype.itemsize and _same_bits(small.to(tensor.dtype), tensor):
                return small
    return tensor


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes: -0.0 is not 0.0."""
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# ---------------------------------------------------------------------------------------------------- loading


def _network(path: str | Path, header: Mapping[str, Any], network: nn.Module | None) -> nn.Module:
    arch, cls = header["arch"], header["class"]
    if network is not None:
        if type(network).__qualname__ != cls:
            raise InputError(
                f"{path} is a quantized {cls}, not a {type(network).__qualname__}; pass a new {cls}"
            )
        return network
    if arch is None:
        raise InputError(
            f"{path} is a quantized {cls}, which no --arch names; pass a new one: QuantModel.load(path, model={cls}(...))"
        )
    if arch not in list_models():
        raise InputError(
            f"{path} needs the architecture {arch!r} of a plug-in; name the file that registers it with --arch FILE.py"
        )
    return create_network(arch, header["kwargs"])


def _rebuild(model: "QuantModel", header: Mapping[str, Any], path: str | Path) -> None:
    """The nodes that calibration made, in their order and with their settings."""
    runtime = model.runtime
    for name, kind, options in header["functions"]:
        runtime.add_function(name, kind, options)
    nodes = _nodes(model)
    if _sizes(model) != header["sizes"] or any(name not in nodes for name, _ in header["order"]):
        raise InputError(
            f"{path} was saved from a network of other layers or sizes than this {header['class']}; build it as then"
        )
    for name, node in nodes.items():
        if name in header["configs"]:
            node.config = QuantConfig(**header["configs"][name])
            if isinstance(node, QuantMAC):
                node.set_bits()  # those of this config
    runtime.nodes.clear()
    for name, calls in header["order"]:
        runtime.nodes[name] = nodes[name]
        nodes[name].calls = calls
    for name, (rounding, _) in header["roundings"].items():
        nodes[name].weight_quantizer.set_rounding(rounding, nodes[name].float_weight())
    for name, (_, hardened) in header["roundings"].items():
        started = nodes[name].weight_quantizer.rounding
        started.hardened = hardened
        if isinstance(started, AdaRound):
            started.base = None  # the file's, not that of this network's weights
    for grid_path, facts in header["grids"].items():
        grid = model.get_submodule(grid_path)
        grid.frozen = True
        for fact, value in zip(_GRID_FACTS, facts):
            setattr(grid, fact, value)
    for name, node in nodes.items():
        node.quantized = name not in header["float_nodes"]
    runtime.kept_in_float.clear()
    runtime.kept_in_float.update(
        {(function, where): calls for function, where, calls in header["kept_in_float"]}
    )


def _fill(model: "QuantModel", tensors: Mapping[str, Tensor], constants: set[str], path: str | Path) -> None:
    """Put every tensor of the file in its place; what the program never reads gives its memory back."""
    other = f"{path} was saved from another network than this {type(model.model).__qualname__}"
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            raise InputError(f"{other}: {owner} is unknown") from None
        if key in module._parameters:
            old = module._parameters[key]
            is_learned = isinstance(module, Grid) or ".weight_quantizer." in name or key.startswith("log_n")
            if (old is None and key != "border") or (
                old is not None and old.shape != tensor.shape and not is_learned
            ):
                raise InputError(f"{other}: {name} has shape {tuple(tensor.shape)} there")
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        elif key in module._buffers:
            module._buffers[key] = tensor
        else:
            raise InputError(f"{other}: {name} is unknown")
    unread, persistent = unread_tensors(model), model.state_dict().keys()
    for name, tensor in _tensors(model):
        if name in unread:
            _empty(model, name, tensor)
        elif name not in tensors and name not in constants and tensor.numel() and name in persistent:
            raise InputError(f"{other}: {name} is missing")


def _complete(model: "QuantModel", header: Mapping[str, Any], path: str | Path) -> None:
    """What older files do not say of layers with float inputs: AdaRound's floors come from the weights,
    groups cannot.

    Raises:
        InputError: output channels share scales, and the file does not say which.
    """
    for name in header["roundings"]:
        quantizer, weight = model.nodes[name].weight_quantizer, model.nodes[name].float_weight()
        if quantizer.group_count and quantizer.group is None:
            raise InputError(
                f"{path} is of a version that did not write which output channels of {name} share a scale; quantize the codec again"
            )
        if isinstance(quantizer.rounding, AdaRound) and quantizer.rounding.base is None:
            quantizer.rounding.base = quantizer.in_steps(weight).floor()


def _empty(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A tensor of the same shape in four bytes; NaN, so that reading it after all cannot pass unnoticed."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    value = (
        torch.full((), torch.nan, dtype=tensor.dtype)
        if tensor.is_floating_point()
        else torch.zeros((), dtype=tensor.dtype)
    )
    value = value.expand(tensor.shape)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value


# ------------------------------------------------------------------------------------------------------ parts


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name; those of a module in several places under the first one's name
    alone."""
    return [
        (f"{path}.{key}" if path else key, tensor)
        for path, part in module.named_modules()
        for key, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    ]


def _nodes(model: "QuantModel") -> dict[str, QuantModule]:
    """Every node, whether it has run or not, by the name that it tells the runtime."""
    return {
        module.name: module for module in model.modules() if isinstance(module, QuantModule) and module.name
    }


def _grids(model: "QuantModel") -> Iterator[tuple[str, Grid]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Grid))


def _sizes(model: "QuantModel") -> str:
    """A fingerprint of the wrapped layers' names and shapes."""
    shapes = {
        f"{name}.{key}": list(tensor.shape)
        for name, node in model.rewrite.nodes.items()
        for key, tensor in node.named_parameters()
        if key.startswith("module.")
    }
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def _seal(header: Mapping[str, Any]) -> str:
    """SHA-256 of the header as JSON."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
