"""Which float codecs a command line asks for: a file, a pattern of files, CompressAI's, or the embedded
ones."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from licq.models.checkpoints import (
    embedded_checkpoint,
    embedded_qualities,
    identify_file,
    load_checkpoint,
    rates_of,
    read_checkpoint,
)
from licq.models.qvrf import VariableRate
from licq.models.registry import Architecture, get_architecture, list_models
from licq.support.errors import InputError
from licq.support.files import sha256

DEFAULT_ARCH = "lu2022"


@dataclass(frozen=True)
class FloatModel:
    """One trained codec: where it lies and what it was trained for.

    sha256: of the file; for an architecture with a loader of its own, of the tensors that it gives.
    lmbda: the weight of the distortion in J; own_lambda: the user chose it, so the file's need not be the
    quality's.
    origin: embedded | pretrained | checkpoint.
    """

    arch: str
    quality: int
    lmbda: float
    origin: str
    path: Path
    sha256: str
    own_lambda: bool = False

    def load(self) -> nn.Module:
        """The network, in eval mode on the CPU.

        Raises:
            InputError: the file is damaged, or of another architecture or quality.
        """
        return load_checkpoint(self.path, self.arch, self.quality, self.lmbda if self.own_lambda else None)


def set_rate(model: nn.Module, level: float) -> None:
    """Set a variable-rate codec, float or quantized, to a level."""
    cast(VariableRate, model).set_level(level)


def find_float_models(
    arch: str | None = None,
    qualities: Sequence[int] | str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    metric: str = "mse",
    lmbdas: Sequence[float] | None = None,
) -> list[FloatModel]:
    """The float codecs, by rising quality; each file exists, but only `FloatModel.load` looks inside.

    Args:
        arch: a name or a plug-in's file; None: what the checkpoint says or looks like, else lu2022.
        qualities: None or "all": every one that there is.
        checkpoint: a file, or a pattern with {quality} in it.
        lmbdas: one a quality, None: the architecture's.

    Raises:
        InputError: contradicting arguments, unknown names, or files that are not there.
    """
    if checkpoint is not None and pretrained:
        raise InputError("--checkpoint and --pretrained exclude each other; give one of them")
    if isinstance(qualities, str):  # "all"
        qualities = None
    if checkpoint is not None:
        architecture, files = _from_files(arch, qualities, checkpoint, metric, lmbdas is not None)
    else:
        architecture = get_architecture(arch or DEFAULT_ARCH)
        files = (
            _pretrained(architecture, qualities, metric) if pretrained else _embedded(architecture, qualities)
        )
    if lmbdas is not None and len(lmbdas) != len(files):
        raise InputError(
            f"{len(lmbdas)} values of --lambda for {len(files)} qualities ({', '.join(map(str, files))}); "
            "give one a quality, separated by commas"
        )

    def digest(quality: int, path: Path) -> str:
        if architecture.loader is None:
            return sha256(path)
        return weights_digest(load_checkpoint(path, architecture.name, quality))

    origin = "checkpoint" if checkpoint is not None else "pretrained" if pretrained else "embedded"
    return [
        FloatModel(
            architecture.name,
            quality,
            lmbdas[index] if lmbdas else architecture.lambda_for(quality, metric),
            origin,
            path,
            digest(quality, path),
            lmbdas is not None,
        )
        for index, (quality, path) in enumerate(files.items())
    ]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _embedded(architecture: Architecture, qualities: Sequence[int] | None) -> dict[int, Path]:
    if qualities is None:
        qualities = embedded_qualities(architecture.name)
        if not qualities:
            # Its message lists what there is.
            embedded_checkpoint(architecture.name, min(architecture.official))
    return {quality: embedded_checkpoint(architecture.name, quality) for quality in qualities}


def _pretrained(architecture: Architecture, qualities: Sequence[int] | None, metric: str) -> dict[int, Path]:
    from licq.models.pretrained import pretrained_checkpoint, pretrained_url

    if qualities is None:
        qualities = []
        for quality in sorted(architecture.official):
            try:
                pretrained_url(architecture.name, quality, metric)
                qualities.append(quality)
            except InputError:
                if quality == max(architecture.official) and not qualities:
                    raise
    return {quality: pretrained_checkpoint(architecture.name, quality, metric) for quality in qualities}


def _from_files(
    arch: str | None, qualities: Sequence[int] | None, checkpoint: str, metric: str, own_lambda: bool
) -> tuple[Architecture, dict[int, Path]]:
    if "{quality}" in checkpoint:
        files = (
            _matching(checkpoint)
            if qualities is None
            else {quality: Path(checkpoint.replace("{quality}", str(quality))) for quality in qualities}
        )
        for path in files.values():
            if not path.is_file():
                raise InputError(
                    f"no checkpoint at {path}; choose other qualities with --quality or mend --checkpoint"
                )
        architecture = get_architecture(arch) if arch else _identify(next(iter(files.values())))
    elif arch and get_architecture(arch).loader is not None:  # one path serves every quality
        architecture = get_architecture(arch)
        files = {quality: Path(checkpoint) for quality in qualities or sorted(architecture.official)}
    else:
        path = Path(checkpoint)
        architecture = get_architecture(arch) if arch else _identify(path)
        if architecture.variable:
            files = {quality: path for quality in qualities or rates_of(path)}
        else:
            files = {_only(qualities, checkpoint) or _quality_of(path, architecture, metric): path}
    for quality in files:
        architecture.check_quality(quality)
    return architecture, files


def _only(qualities: Sequence[int] | None, checkpoint: str) -> int | None:
    """The one quality that was asked for, or None."""
    if qualities is not None and len(qualities) > 1:
        raise InputError(
            f"--checkpoint {checkpoint} is one file for {len(qualities)} qualities; give one --quality, or "
            "put {quality} into the name"
        )
    return qualities[0] if qualities else None


def _matching(pattern: str) -> dict[int, Path]:
    """quality -> file for a pattern with {quality} in its file name."""
    folder, name = Path(pattern).parent, Path(pattern).name
    if "{quality}" not in name or "{quality}" in str(folder):
        raise InputError(
            f"--checkpoint {pattern} has {{quality}} in a folder's name; say which ones with --quality"
        )
    expression = re.compile(
        re.escape(name).replace(re.escape("{quality}"), "([0-9]+)", 1).replace(re.escape("{quality}"), r"\1")
    )
    files = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = expression.fullmatch(path.name)
        if match and path.is_file():
            files[int(match[1])] = path
    if not files:
        raise InputError(f"no file is named like --checkpoint {pattern}; check the folder and the name")
    return dict(sorted(files.items()))


def _identify(path: Path) -> Architecture:
    content = read_checkpoint(path)
    name = content.metadata.get("arch")
    if name not in list_models():
        name = identify_file(content)
    if name is None:
        raise InputError(
            f"{path} is a checkpoint of no known architecture ({', '.join(list_models())}); give another "
            "file, or its architecture with --arch to see what differs"
        )
    return get_architecture(name)


def _quality_of(path: Path, architecture: Architecture, metric: str) -> int:
    """The quality that a file states, or that its lambda means."""
    metadata = read_checkpoint(path).metadata
    if isinstance(metadata.get("quality"), int):
        return metadata["quality"]
    stated = metadata.get("lambda")
    if stated is not None:
        table = architecture.lambdas.get(metric, {})
        near = [quality for quality in table if abs(table[quality] - stated) <= 0.01 * stated]
        if near:
            return near[0]
    raise InputError(
        f"{path} does not say its quality; pass it with --quality"
        + (f", and --lambda {stated:g}, which it was trained with" if stated is not None else "")
    )
