"""The commands encode, decode and info: image files to .licq files and back."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from licq.codec.container import TILE
from licq.support import options
from licq.support.cli import ArgumentParser
from licq.support.errors import InputError
from licq.support.files import atomic_path
from licq.support.parallel import default_jobs, ordered
from licq.support.progress import progress

SUFFIX = ".licq"
_IMAGE = ".png"
_MODEL = ".safetensors"


def build_encode_parser(prog: str = "main_eval.py encode") -> ArgumentParser:
    """The flags of `encode`."""
    parser = ArgumentParser(prog=prog, description="Write images as .licq files.", allow_abbrev=False)
    parser.add_argument("inputs", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    _add_model_and_output(parser)
    parser.add_argument(
        "--quality",
        metavar="Q",
        type=float,
        help="which model of the folder; for a variable-rate codec the rate, a real number from 1",
    )
    _add_machine(parser)
    return parser


def build_decode_parser(prog: str = "main_eval.py decode") -> ArgumentParser:
    """The flags of `decode`."""
    parser = ArgumentParser(
        prog=prog, description="Write the images of .licq files as PNG.", allow_abbrev=False
    )
    parser.add_argument("inputs", metavar="FILE", nargs="+", help=".licq files, or folders of them")
    _add_model_and_output(parser)
    _add_machine(parser)
    return parser


def build_info_parser(prog: str = "main_eval.py info") -> ArgumentParser:
    """The flags of `info`."""
    parser = ArgumentParser(
        prog=prog, description="Say what .licq files and quantized models hold.", allow_abbrev=False
    )
    parser.add_argument(
        "inputs", metavar="FILE", nargs="+", help=".licq files, or folders of them; model.safetensors files"
    )
    return parser


def _add_model_and_output(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--out", metavar="PATH", help="the file, or for several a folder (default: beside each input)"
    )
    parser.add_argument(
        "--model",
        metavar="RUN",
        required=True,
        help="a model.safetensors, or the folder of a main_ptq.py run",
    )
    options.add_plugin(parser)


def _add_machine(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tile",
        metavar="N",
        type=options.count,
        default=TILE,
        help="compute images of more than N x N pixels in tiles of about that size, with the same result in "
        f"less memory; 0: all in one piece (default: {TILE})",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=options.positive,
        help="images at the same time, each in a process (default: for several images one a processor, at "
        "2 GiB of memory each)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=options.threads,
        help="CPU threads of each job, 1 to 256 (default: PyTorch's choice, with several jobs 1)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def models_of(run: str | Path) -> list[Path]:
    """The quantized models of a run's folder, or the one file.

    Raises:
        InputError: there is none.
    """
    path = Path(os.path.expanduser(run))
    models = (
        [path]
        if path.is_file()
        else sorted(path.glob("q*/model.safetensors")) or list(path.glob("model.safetensors"))
    )
    if not models:
        raise InputError(
            f"no quantized model at {run}; give a model.safetensors or a folder that main_ptq.py has "
            "written with --model"
        )
    return models


def files_of(inputs: Sequence[str], suffixes: frozenset[str]) -> list[Path]:
    """Every file that `inputs` name; of folders those with one of the suffixes, hidden ones left out.

    Raises:
        InputError: a missing input, an empty folder.
    """
    sources: list[Path] = []
    for word in inputs:
        path = Path(os.path.expanduser(word))
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
            )
            if not inside:
                raise InputError(f"no {' or '.join(sorted(suffixes))} file in {word}; give another folder")
            sources += inside
        elif not path.is_file():
            raise InputError(f"{word}: no such file; check the path")
        else:
            sources.append(path)
    return sources


def jobs(
    inputs: Sequence[str], out: str | None, suffixes: frozenset[str], suffix: str
) -> list[tuple[Path, Path]]:
    """(input, output) for every file that `inputs` name.

    Raises:
        InputError: a missing input, an empty folder, two inputs for one output.
    """
    sources = files_of(inputs, suffixes)
    if out is not None and len(sources) == 1 and not Path(out).is_dir() and not Path(inputs[0]).is_dir():
        pairs = [(sources[0], Path(out))]
    else:
        pairs = [(path, (Path(out) if out else path.parent) / (path.stem + suffix)) for path in sources]
    targets = Counter(target for _, target in pairs)
    for source, target in pairs:
        if targets[target] > 1:
            raise InputError(
                f"two inputs would be written to {target}; rename one, or write them to different folders"
            )
        if target.exists() and target.samefile(source):
            raise InputError(f"{source} would be overwritten by its own output; name another with -o")
    return pairs


@dataclass(frozen=True)
class _Piece:
    """One file to code, and with what."""

    source: Path
    target: Path
    model: Path
    level: float | None
    threads: int | None
    tile: int | None
    progress: bool
    arch: str | None


@lru_cache(maxsize=1)
def _loaded(model: Path, threads: int | None, tile: int | None, arch: str | None):
    from licq.codec.quick import QuickCodec

    if arch is not None:  # a plug-in's file registers its codec, in this process
        from licq.models.registry import get_architecture

        get_architecture(arch)
    return QuickCodec(model, threads, tile)


def _codec_of(piece: _Piece):
    codec = _loaded(piece.model, piece.threads, piece.tile, piece.arch)
    codec.progress = piece.progress
    return codec


def encode(args: argparse.Namespace) -> int:
    """Write every image as a .licq file; returns the exit status."""
    from licq.data.datasets import SUFFIXES

    model, level = _model_for(args)
    pairs = jobs(args.inputs, args.out, frozenset(SUFFIXES), SUFFIX)
    turned = []
    for (source, _), (target, size, pixels, is_turned) in zip(
        pairs, _worked(_encode_one, [(*pair, model, level) for pair in pairs], args, "encoding")
    ):
        turned += [source] if is_turned else []
        if not args.quiet:
            print(f"{target}: {size} bytes, {8 * size / pixels:.4f} bits per pixel")
    if turned:
        others = f" and {len(turned) - 1} more" if turned[1:] else ""
        print(
            f"{turned[0]}{others}: coded as stored, without the EXIF orientation; to have it applied, turn "
            "the pixels first (ImageMagick: convert IN -auto-orient OUT.png)",
            file=sys.stderr,
        )
    return 0


def _encode_one(piece: _Piece) -> tuple[Path, int, int, bool]:
    from licq.data.images import is_turned, stored_pixels

    pixels = stored_pixels(piece.source).transpose(2, 0, 1)
    data = _codec_of(piece).encode(pixels, piece.level)
    with atomic_path(piece.target) as temporary:
        temporary.write_bytes(data)
    return piece.target, len(data), pixels[0].size, is_turned(piece.source)


def _model_for(args: argparse.Namespace) -> tuple[Path, float | None]:
    """(the model to encode with, the rate of a variable-rate one)."""
    files = models_of(args.model)
    if len(files) > 1:
        by_quality = {file.parent.name[1:]: file for file in files}
        quality = f"{args.quality:g}" if args.quality is not None else None
        if quality not in by_quality:
            raise InputError(
                f"{args.model} holds the qualities {', '.join(by_quality)}; choose one of them with --quality"
            )
        return by_quality[quality], None
    codec = _loaded(files[0], args.threads, args.tile or None, args.arch)
    if codec.variable and args.quality is None:
        raise InputError(
            f"{files[0]} has many rates; choose one with --quality, a number from 1 to "
            f"{codec.codec.model.model.levels}"
        )
    if not codec.variable and args.quality is not None and files[0].parent.name[1:] != f"{args.quality:g}":
        raise InputError(f"{files[0]} has one rate; leave out --quality")
    if not codec.variable:
        return files[0], None
    codec.gain(args.quality)  # before any image is read
    return files[0], args.quality


def decode(args: argparse.Namespace) -> int:
    """Write the image of every .licq file; returns the exit status."""
    from licq.codec.container import Container
    from licq.codec.names import names_of

    pairs = jobs(args.inputs, args.out, frozenset({SUFFIX}), _IMAGE)
    for _, target in pairs:
        _format(target)
    models = {name: file for file in models_of(args.model) for name in names_of(file)}
    given = []
    for source, target in pairs:
        digest = _named(source, Container.from_bytes, _read(source)).model
        if digest not in models:
            there = ", ".join(names_of(file)[0].hex() for file in models_of(args.model))
            raise InputError(
                f"{source} was written by the model {digest.hex()}, and {args.model} holds {there}; give "
                "that one with --model"
            )
        given.append((source, target, models[digest], None))
    for _ in _worked(_decode_one, sorted(given, key=lambda piece: str(piece[2])), args, "decoding"):
        pass
    return 0


def _decode_one(piece: _Piece) -> None:
    from PIL import Image

    pixels = _named(piece.source, _codec_of(piece).decode, _read(piece.source))
    array = pixels.transpose(1, 2, 0).copy()
    image = Image.fromarray(array if len(pixels) == 3 else array[:, :, 0])
    with atomic_path(piece.target) as temporary:
        image.save(temporary, format=_format(piece.target))


def _worked(
    function: Callable[[_Piece], Any],
    pieces: Sequence[tuple[Path, Path, Path, float | None]],
    args: argparse.Namespace,
    what: str,
) -> Iterable[Any]:
    """`function` of each (source, target, model, level), with progress: of images, or of the tiles of a
    single one."""
    count = min(args.jobs or default_jobs(len(pieces), args.threads), len(pieces))
    threads = args.threads if args.threads or count == 1 else 1
    shown = not args.quiet and len(pieces) == 1
    work = [
        _Piece(source, target, model, level, threads, args.tile or None, shown, args.arch)
        for source, target, model, level in pieces
    ]
    return progress(
        ordered(function, work, count),
        total=len(work),
        desc=what,
        unit="image",
        enabled=not args.quiet and len(work) > 1,
    )


def info(args: argparse.Namespace) -> int:
    """Print a line on every .licq file and quantized model; returns the exit status."""
    from licq.codec.container import GAIN_UNIT, Container

    for source in files_of(args.inputs, frozenset({SUFFIX})):
        if source.suffix == _MODEL:
            from licq.runs.model_line import model_line

            print(model_line(source))
            continue
        data = _read(source)
        content = _named(source, Container.from_bytes, data)
        payload = sum(map(len, content.streams))
        grey = " grey" if content.grey else ""
        rate = f", gain {content.gain * GAIN_UNIT:.4f}" if content.gain else ""
        print(
            f"{source}: {content.width}x{content.height}{grey}, model {content.model.hex()}{rate}, "
            f"{len(content.streams)} stream{'s' if len(content.streams) > 1 else ''} of {payload} bytes, "
            f"{len(data)} bytes in all, {8 * len(data) / (content.width * content.height):.4f} bits per pixel"
        )
    return 0


def _named(source: Path, function: Callable, data: bytes):
    """`function(data)`, whose complaint names the file."""
    try:
        return function(data)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _format(path: Path) -> str:
    """Only formats that keep every pixel: a decoder that changes them again is none."""
    formats = {".png": "PNG", ".ppm": "PPM", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
    if path.suffix.lower() not in formats:
        raise InputError(
            f"{path}: decoded images are written without loss; choose a name that ends in "
            f"{', '.join(formats)}"
        )
    return formats[path.suffix.lower()]


def main_encode(argv: Sequence[str], prog: str = "main_eval.py encode") -> int:
    """The command line `argv` of `encode`; returns the exit status."""
    return encode(build_encode_parser(prog).parse_args(argv))


def main_decode(argv: Sequence[str], prog: str = "main_eval.py decode") -> int:
    """The command line `argv` of `decode`; returns the exit status."""
    return decode(build_decode_parser(prog).parse_args(argv))


def main_info(argv: Sequence[str], prog: str = "main_eval.py info") -> int:
    """The command line `argv` of `info`; returns the exit status."""
    return info(build_info_parser(prog).parse_args(argv))


COMMANDS = {"encode": main_encode, "decode": main_decode, "info": main_info}
