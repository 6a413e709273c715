"""main_eval.py encode, decode and info: image files to .licq files and back."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from support import options
from support.cli import ArgumentParser
from support.errors import InputError

NAMES = ("encode", "decode", "info")
SUFFIX = ".licq"
_IMAGE = ".png"
_EPILOG = "`main_eval.py --help` is about evaluation."


def run(argv: Sequence[str]) -> int:
    """The command line `argv`, whose first word is one of `NAMES`."""
    parser = ArgumentParser(prog="main_eval.py", description="Code images with a quantized codec, as real files.", epilog=_EPILOG, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    _add(commands, "encode", "write images as .licq files", "IMAGE", "image files, or folders of them", encode)
    _add(commands, "decode", "write the images of .licq files as PNG", "FILE", ".licq files, or folders of them", decode)
    info_parser = commands.add_parser("info", help="say what .licq files hold", allow_abbrev=False)
    info_parser.add_argument("inputs", metavar="FILE", nargs="+", help=".licq files, or folders of them")
    info_parser.set_defaults(function=info)
    args = parser.parse_args(argv)
    return args.function(args)


def _add(commands, name: str, what: str, metavar: str, inputs: str, function: Callable) -> None:
    parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False)
    parser.add_argument("inputs", metavar=metavar, nargs="+", help=inputs)
    parser.add_argument("-o", "--out", metavar="PATH", help="the file, or for several a folder (default: beside each input)")
    parser.add_argument("--model", metavar="RUN", required=True, help="a model.safetensors, or the folder of a main_ptq.py run")
    if name == "encode":
        parser.add_argument("--quality", metavar="Q", type=float,
                            help="which model of the folder; for a variable-rate codec the rate, a real number from 1")  # fmt: skip
    parser.add_argument("--threads", metavar="N", type=options.threads, help="CPU threads, 1 to 256 (default: PyTorch's choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(function=function)


def models_of(run: str | Path) -> list[Path]:
    """The quantized models of a run's folder, or the one file.

    Raises:
        InputError: there is none.
    """
    path = Path(run).expanduser()
    found = [path] if path.is_file() else sorted(path.glob("q*/model.safetensors")) or list(path.glob("model.safetensors"))
    if not found:
        raise InputError(f"no quantized model at {run}; give a model.safetensors or a folder that main_ptq.py has written with --model")
    return found


def files_of(inputs: Sequence[str], suffixes: frozenset[str]) -> list[Path]:
    """Every file that `inputs` name; of folders those with one of the suffixes.

    Raises:
        InputError: a missing input, an empty folder.
    """
    sources: list[Path] = []
    for word in inputs:
        path = Path(word).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise InputError(f"no {' or '.join(sorted(suffixes))} file in {word}; give another folder")
            sources += inside
        elif not path.is_file():
            raise InputError(f"{word}: no such file; check the path")
        else:
            sources.append(path)
    return sources


def jobs(inputs: Sequence[str], out: str | None, suffixes: frozenset[str], suffix: str) -> list[tuple[Path, Path]]:
    """(input, output) for every file that `inputs` name.

    Raises:
        InputError: a missing input, an empty folder, two inputs for one output.
    """
    sources = files_of(inputs, suffixes)
    single = out is not None and len(sources) == 1 and not Path(out).is_dir() and not Path(inputs[0]).is_dir()
    pairs = [(p, Path(out) if single else (Path(out) if out else p.parent) / (p.stem + suffix)) for p in sources]
    targets = [target for _, target in pairs]
    for source, target in pairs:
        if targets.count(target) > 1:
            raise InputError(f"two inputs would be written to {target}; rename one, or write them to different folders")
        if target.exists() and target.samefile(source):
            raise InputError(f"{source} would be overwritten by its own output; name another with -o")
    return pairs


def encode(args: argparse.Namespace) -> int:
    import torch

    from data.datasets import SUFFIXES
    from data.images import load_pixels

    codec, level = _codec_for(args)
    pairs = jobs(args.inputs, args.out, frozenset(SUFFIXES), SUFFIX)
    for source, target in _shown(pairs, args, "encoding"):
        pixels = torch.from_numpy(load_pixels(source)).permute(2, 0, 1)
        data = codec.encode(pixels, level)
        _write(target, data)
        if not args.quiet:
            print(f"{target}: {len(data)} bytes, {8 * len(data) / pixels[0].numel():.4f} bits per pixel")
    return 0


def _codec_for(args: argparse.Namespace):
    """(the codec to encode with, the rate of a variable-rate one)."""
    from codec.api import Codec
    from support.determinism import set_threads

    set_threads(args.threads)
    files = models_of(args.model)
    if len(files) > 1:
        known = {file.parent.name[1:]: file for file in files}
        wanted = f"{args.quality:g}" if args.quality is not None else None
        if wanted not in known:
            raise InputError(f"{args.model} holds the qualities {', '.join(known)}; choose one of them with --quality")
        return Codec.load(known[wanted], args.threads), None
    codec = Codec.load(files[0], args.threads)
    if codec.variable and args.quality is None:
        raise InputError(f"{files[0]} has many rates; choose one with --quality, a number from 1 to {codec.model.model.levels}")
    if not codec.variable and args.quality is not None and files[0].parent.name[1:] != f"{args.quality:g}":
        raise InputError(f"{files[0]} has one rate; leave out --quality")
    if codec.variable and not 0 < args.quality <= 1000:
        raise InputError(f"--quality {args.quality:g} is out of range; choose a number from 1 to {codec.model.model.levels}")
    return codec, args.quality if codec.variable else None


def decode(args: argparse.Namespace) -> int:
    from PIL import Image

    from codec.api import Codec
    from codec.container import MODEL_BYTES, Container
    from support.determinism import set_threads
    from support.files import atomic_path, sha256

    set_threads(args.threads)
    pairs = jobs(args.inputs, args.out, frozenset({SUFFIX}), _IMAGE)
    for _, target in pairs:
        _format(target)
    models = {bytes.fromhex(sha256(file))[:MODEL_BYTES]: file for file in models_of(args.model)}
    codecs: dict[bytes, Codec] = {}
    for source, target in _shown(pairs, args, "decoding"):
        data = _read(source)
        wanted = _named(source, Container.from_bytes, data).model
        if wanted not in models:
            there = ", ".join(digest.hex() for digest in models)
            raise InputError(f"{source} was written by the model {wanted.hex()}, and {args.model} holds {there}; give that one with --model")
        if wanted not in codecs:
            codecs = {wanted: Codec.load(models[wanted], args.threads)}
        pixels = _named(source, codecs[wanted].decode, data)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        with atomic_path(target) as temporary:
            image.save(temporary, format=_format(target))
    return 0


def info(args: argparse.Namespace) -> int:
    from codec.container import GAIN_UNIT, Container

    for source in files_of(args.inputs, frozenset({SUFFIX})):
        data = _read(source)
        content = _named(source, Container.from_bytes, data)
        payload = sum(map(len, content.streams))
        rate = f", gain {content.gain * GAIN_UNIT:.4f}" if content.gain else ""
        print(f"{source}: {content.width}x{content.height}, model {content.model.hex()}{rate}, {len(content.streams)} stream"
              f"{'s' if len(content.streams) > 1 else ''} of {payload} bytes, {len(data)} bytes in all, "
              f"{8 * len(data) / (content.width * content.height):.4f} bits per pixel")
    return 0


def _shown(pairs: list, args: argparse.Namespace, what: str) -> Iterator:
    from support.progress import progress

    return progress(pairs, desc=what, unit="image", enabled=not args.quiet and len(pairs) > 1)


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


def _write(path: Path, data: bytes) -> None:
    from support.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _format(path: Path) -> str:
    """Only formats that keep every pixel: a decoder that changes them again is none."""
    formats = {".png": "PNG", ".ppm": "PPM", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
    if path.suffix.lower() not in formats:
        raise InputError(f"{path}: decoded images are written without loss; choose a name that ends in {', '.join(formats)}")
    return formats[path.suffix.lower()]
