"""A quantized model in a line, for `info`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from licq.quant.serialization import read_quantized
from licq.support.files import sha256


def model_line(file: Path) -> str:
    """What a quantized model's file says of it: architecture, bits, identity, what was checked.

    Raises:
        InputError: no such file, damaged, or none of a quantized model.
    """
    header = read_quantized(file)[0]
    config, quality = header["config"], (header["extra"] or {}).get("quality")
    return (
        f"{file}: {header['arch'] or header['class']}{'' if quality is None else f' quality {quality}'}, "
        f"W{config['w_bits']}A{config['a_bits']}, {file.stat().st_size} bytes, "
        f"identity {header['identity']}, SHA-256 of the file {sha256(file)}; {_said_to_be_checked(header)}"
    )


def _said_to_be_checked(header: Mapping[str, Any]) -> str:
    """What a model's file says was checked, in words."""
    checked = header.get("checked", {})
    files, repeatable = checked.get("files", {}), checked.get("repeatable")
    parts = []
    if repeatable:
        exactly = " to the bit" if repeatable["exact"] else ""
        parts.append(f"an image alone, again and in a batch gives the same pixels{exactly}")
    if "none" in files:
        parts.append(f"it has no files: {files['none']}")
    elif files:
        parts.append(f"a file of {files['width']}x{files['height']} pixels decodes to its own pixels")
    return f"checked: {', '.join(parts)}" if parts else "not checked yet"
