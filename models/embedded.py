"""The checkpoints that come with the project, in models/zoo/."""

import re
from pathlib import Path

from licq.models.checkpoint_files import read_file
from licq.models.registry import get_architecture, list_models
from licq.support.errors import InputError

ZOO = Path(__file__).parent / "zoo"


def embedded_qualities(arch: str) -> list[int]:
    """The qualities for which a checkpoint of this architecture comes with the project, ascending."""
    if get_architecture(arch).variable:
        path = ZOO / f"{arch}.safetensors"
        return rates_of(path) if path.is_file() else []
    pattern = re.compile(re.escape(arch) + r"-q(\d+)\.safetensors")
    matches = (pattern.fullmatch(file.name) for file in ZOO.glob("*.safetensors"))
    return sorted(int(match[1]) for match in matches if match)


def embedded_checkpoint(arch: str, quality: int) -> Path:
    """The file of the checkpoint that comes with the project for this architecture and quality.

    Raises:
        InputError: there is none; the message lists all that there are.
    """
    architecture = get_architecture(arch)
    architecture.check_quality(quality)
    path = ZOO / (f"{arch}.safetensors" if architecture.variable else f"{arch}-q{quality}.safetensors")
    if path.is_file() and not (architecture.variable and quality not in rates_of(path)):
        return path
    embedded = [
        f"{name} {', '.join(map(str, embedded_qualities(name)))}"
        for name in list_models()
        if embedded_qualities(name)
    ]
    raise InputError(
        f"no embedded checkpoint of {arch} at quality {quality}; there are: {'; '.join(embedded) or 'none'}; "
        "choose one of these or give a file as `checkpoint`"
    )


def rates_of(path: Path) -> list[int]:
    """The qualities of the checkpoint of a variable-rate codec: 1 to the number of its gains.

    Raises:
        InputError: the file is no such checkpoint.
    """
    gains = next((tensors["Gain"] for _, tensors in read_file(path).candidates if "Gain" in tensors), None)
    if gains is None:
        raise InputError(
            f"{path} is no checkpoint of a variable-rate codec (it has no Gain); give another file as "
            "`checkpoint`"
        )
    return list(range(1, gains.numel() + 1))
