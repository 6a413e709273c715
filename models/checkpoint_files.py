"""Checkpoint files: reading and writing tensors and metadata, whatever the architecture."""

import hashlib
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor

from licq.models.wrappers import behind_prefixes, wrapped
from licq.support.errors import InputError
from licq.support.files import atomic_path

QUANTIZED_FORMAT = "licq-quantized"  # what the header of a quantized model's file states as its format
CDF_STATE = ("_quantized_cdf", "_offset", "_cdf_length")
_PACKED = "_cdf_steps"
_COMPRESSED = "xz"  # the one tensor of a compressed file
_HEADER = "header"  # inside it, beside the tensors: the metadata
_MAX_RATIO = 64  # of the sizes of a file's content and of its xz: no file of licq reaches it
_OLD_BOTTLENECK = re.compile(
    r"(.*\b(?:entropy_bottleneck|factorized_entropy_func)\.)_(matri|bias|factor)(?:x|es|ces|s)?\.?(\d+)"
)


@dataclass(frozen=True)
class CheckpointFile:
    """The content of a checkpoint file.

    Args:
        state_dict: name -> tensor. Floating point is float32; names are those that the installed CompressAI
            uses.
        metadata: what the file states of arch, kwargs, quality, lambda and metric, and what else its writer
            has added.
        alternatives: other tensors of the file that may be the network's, the likeliest first: (where they
            are, name -> tensor). Parts of `state_dict` behind a prefix of their names, other dictionaries.
        place: where `state_dict` is in the file; empty at its top.
    """

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    alternatives: tuple[tuple[str, dict[str, Tensor]], ...] = ()
    place: str = ""

    @property
    def candidates(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        """`state_dict` and its alternatives, each with the place where it is."""
        return ((self.place, self.state_dict), *self.alternatives)


def read_file(path: str | Path) -> CheckpointFile:
    """Read the state_dicts, bare or wrapped, of a PyTorch file (zip or legacy), a safetensors file or an npz
    file of NumPy.

    Nothing in the file is executed. Constants of layers (bounds such as 1e-9) are left out where the file has
    them in half precision, which they do not survive; every layer has its own.

    Raises:
        InputError: the file is missing, empty, damaged, no checkpoint, or needs code to be unpickled.
    """
    path = Path(path)
    head = _head(path)
    if len(head) > 8 and head[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") == QUANTIZED_FORMAT:
            raise InputError(
                f"{path} is a quantized model, not a checkpoint; main_eval.py takes it as `model`"
            )
        found = [("", tensors, metadata), *((f"{p}*", part, {}) for p, part in behind_prefixes(tensors))]
    else:
        found = list(wrapped(_read_pytorch(path, head) if not _is_npz(path, head) else _read_npz(path)))
        if not found:
            raise InputError(
                f"{path} holds no state_dict; save the weights with torch.save(model.state_dict(), PATH)"
            )
    different: dict[tuple, tuple[str, dict[str, Tensor]]] = {}
    for place, tensors, _ in found:  # a prefix that names lose anyway makes no other candidate
        key = tuple(sorted((rename_key(name), id(tensor)) for name, tensor in tensors.items()))
        if key not in different:
            different[key] = place, _clean(tensors)
    (place, state_dict), *others = different.values()
    if not others:
        refuse_diverged(state_dict, path)
    return CheckpointFile(state_dict, found[0][2], tuple(others), place)


def write_file(path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file: CDF tables packed, metadata and a SHA-256 of the tensors as JSON in its
    header.

    Raises:
        InputError: the file cannot be written.
    """
    write_tensors(path, pack_cdfs(state_dict), metadata)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file. Tensors are as they are stored, CDF tables unpacked.

    Raises:
        InputError: the file is missing, empty, damaged or of another format.
    """
    path = Path(path)
    if _head(path)[8:9] != b"{":
        raise _damaged(path, "it is no safetensors file")
    return _read_safetensors(path)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    compress: bool = False,
    outside: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, complete or not at all.

    Its header has the metadata and a SHA-256 of the tensors, as JSON.

    Args:
        compress: write one tensor, `xz`: the bytes of a safetensors file with the tensors and the metadata,
            compressed. Without, the many names and small tensors of a quantized model are a third of its
            file.
        outside: what of the metadata a compressed file also states in its own header; see `read_outside`.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stated = json.dumps({**metadata, "sha256": digest_of(tensors)}, sort_keys=True)
    if compress:
        inside = safetensors.torch.save(
            {**tensors, _HEADER: torch.frombuffer(bytearray(stated.encode()), dtype=torch.uint8)}
        )
        tensors = {_COMPRESSED: torch.frombuffer(bytearray(lzma.compress(inside)), dtype=torch.uint8)}
        own = {"size": len(inside), "sha256": digest_of(tensors)}
        stated = json.dumps({**(outside or {}), **own}, sort_keys=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={"licq": stated}))


def read_outside(path: str | Path) -> dict[str, Any]:
    """What a safetensors file states in its own header; nothing else is read, and nothing is verified.

    Raises:
        InputError: no such file, or none of this format.
    """
    path = Path(path)
    if _head(path)[8:9] != b"{":
        raise _damaged(path, "it is no safetensors file")
    try:
        with safetensors.safe_open(path, "pt") as stream:
            stated = json.loads((stream.metadata() or {}).get("licq", "{}"))
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise _damaged(path, error) from error
    return stated if isinstance(stated, dict) else {}


def pack_cdfs(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each CDF table by the differences within its rows.

    `_quantized_cdf`, int32 (rows, longest), of whose rows the first `_cdf_length` entries count, becomes
    `_cdf_steps`, uint16 (sum of lengths - rows,). A Gaussian's table takes a fifteenth then. A table whose
    rows do not begin at 0, that has a difference beyond 16 bits, or that is no table, is left as it is.
    """
    packed = dict(state_dict)
    for name, cdf in state_dict.items():
        prefix, _, last = name.rpartition(".")
        lengths = state_dict.get(f"{prefix}._cdf_length")
        if last != CDF_STATE[0] or lengths is None or not _is_table(cdf, lengths):
            continue
        rows = [row[:length] for row, length in zip(cdf.cpu(), lengths.flatten().tolist())]
        steps = torch.cat([row.diff() for row in rows])
        in_range = bool(((steps >= 0) & (steps < 2**16)).all()) and not any(int(row[0]) for row in rows)
        if in_range:
            entry = {f"{prefix}.{_PACKED}": steps.to(torch.int32).to(torch.uint16)}
            if torch.equal(unpack_cdfs({**entry, f"{prefix}._cdf_length": lengths.cpu()})[name], cdf.cpu()):
                del packed[name]
                packed.update(entry)
    return packed


def _is_table(cdf: Tensor, lengths: Tensor) -> bool:
    """Whether these can be the rows of a CDF table, and how many of their entries count."""
    if cdf.ndim != 2 or not cdf.numel() or lengths.numel() != len(cdf) or lengths.is_floating_point():
        return False
    return 0 < int(lengths.min()) and int(lengths.max()) <= cdf.shape[1]


def unpack_cdfs(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack_cdfs`."""
    unpacked = dict(state_dict)
    for name, steps in state_dict.items():
        prefix, _, last = name.rpartition(".")
        if last != _PACKED:
            continue
        lengths = state_dict[f"{prefix}._cdf_length"].flatten().tolist()
        cdf = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
        for row, part in zip(cdf, steps.to(torch.int32).split([length - 1 for length in lengths])):
            row[1 : len(part) + 1] = part.cumsum(0)
        del unpacked[name]
        unpacked[f"{prefix}.{CDF_STATE[0]}"] = cdf
    return unpacked


def rename_key(key: str) -> str:
    """The name that the installed CompressAI gives a tensor.

    The prefixes of DataParallel (`module.`) and torch.compile (`_orig_mod.`) go. Names of older versions are
    replaced: `downsample` is `skip`, and `_matrices.0`, `_matrix0` and `matrices.0` of the entropy bottleneck
    are one.
    """
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    key = key.replace("._orig_mod.", ".")  # of a compiled part
    key = key.replace(".downsample.", ".skip.")
    old = _OLD_BOTTLENECK.fullmatch(key)
    if old and _BOTTLENECK_HAS_LISTS:
        plural = {"matri": "matrices", "bias": "biases", "factor": "factors"}[old[2]]
        return f"{old[1]}{plural}.{old[3]}"
    return key


_BOTTLENECK_HAS_LISTS = "matrices.0" in EntropyBottleneck(1).state_dict()


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {path}; give an existing file as `checkpoint`") from error
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; give a readable file as `checkpoint`"
        ) from error
    if not head:
        raise InputError(f"{path} is empty; download or save it again")
    if head.lstrip()[:1] == b"<":
        raise InputError(f"{path} is a web page, not a checkpoint; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not a checkpoint; fetch the file with git lfs pull")
    return head


def _damaged(path: Path, detail: object) -> InputError:
    first_line = (str(detail).strip().splitlines() or ["it ends too early"])[0][:160]
    return InputError(f"{path} is damaged or no checkpoint ({first_line}); download or save it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as stream:
            stated = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}
        metadata = json.loads(stated.get("licq", "{}"))
        if not isinstance(metadata, dict):
            raise _damaged(path, "its metadata are no JSON object")
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise _damaged(path, error) from error
    expected = metadata.pop("sha256", None)
    if (expected is not None or tensors.keys() == {_COMPRESSED}) and expected != digest_of(tensors):
        raise _damaged(path, "its tensors do not have the SHA-256 that it states")
    if tensors.keys() == {_COMPRESSED}:
        outside = metadata
        tensors, metadata = _decompress(path, tensors[_COMPRESSED], outside.pop("size", None))
        if any(metadata.get(key) != value for key, value in outside.items()):
            raise _damaged(path, "its header states something else than its content")
    try:
        return unpack_cdfs(tensors), metadata
    except (KeyError, RuntimeError, ValueError) as error:
        raise _damaged(path, f"its CDF tables cannot be unpacked: {error}") from error


def _decompress(path: Path, content: Tensor, size: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = content.numpy().tobytes()
    if not isinstance(size, int) or not 0 < size <= _MAX_RATIO * len(data):
        raise _damaged(path, "it does not state its size")
    try:
        inside = lzma.LZMADecompressor().decompress(data, max_length=size)
        if len(inside) != size:
            raise ValueError(f"its tensors take {len(inside)} bytes, and it states {size}")
        tensors = safetensors.torch.load(inside)
        metadata = json.loads(tensors.pop(_HEADER).numpy().tobytes())
        if not isinstance(metadata, dict):
            raise ValueError("its header is no JSON object")
    except (lzma.LZMAError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if metadata.pop("sha256", None) != digest_of(tensors):
        raise _damaged(path, "its tensors do not have the SHA-256 that it states")
    return tensors, metadata


def _is_npz(path: Path, head: bytes) -> bool:
    """Whether the file is a zip archive of NumPy's arrays; one that is cut off goes by its name."""
    if not head.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        return path.suffix == ".npz"


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of numbers of an npz file; other arrays, such as texts, are left out."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            numbers = {name: array for name, array in arrays.items() if array.dtype.kind in "biuf"}
        return {name: torch.from_numpy(array) for name, array in numbers.items()}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, TypeError, ValueError) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path} needs code to be loaded (an array of Python objects), which is refused; where you "
                "trust it, save its numbers alone: numpy.savez(PATH, **weights)"
            ) from error
        raise _damaged(path, error) from error


def _read_pytorch(path: Path, head: bytes) -> Any:
    try:
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise _damaged(path, f"{broken} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch.load raises whatever its many readers raise
        message = str(error)
        if "TorchScript" in message or re.search(r"GLOBAL|Unsupported global|Unsupported class", message):
            culprit = re.search(r"GLOBAL ([\w.]+)", message)
            what = culprit[1] if culprit else "a pickled object"
            raise InputError(
                f"{path} needs code to be loaded ({what}), which is refused; where you trust it, save its "
                "weights alone: torch.save(model.state_dict(), PATH)"
            ) from error
        detail = "it ends too early" if isinstance(error, EOFError) else message
        raise _damaged(
            path, "unreadable" if detail.startswith("Weights only load failed") else detail
        ) from error


def _clean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state_dict: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = rename_key(key)
        if tensor.is_floating_point():
            if tensor.dtype in (torch.float16, torch.bfloat16) and _is_layer_constant(name):
                continue
            tensor = tensor.float()
        state_dict[name] = tensor
    return state_dict


def refuse_diverged(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises InputError where tensors hold NaN or Inf; `path` is where they were read."""
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path} holds numbers that are not finite ({name}); its training has diverged")


def _is_layer_constant(name: str) -> bool:
    return name.rpartition(".")[2] in ("bound", "pedestal", "scale_bound", "target", "mask", "attn_mask")


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, 64 hexadecimal digits, over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
