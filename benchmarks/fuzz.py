"""Damaged and hostile .licq files: how many the decoder refuses, decodes, or crashes on.

    python benchmarks/fuzz.py --model runs/minnen2018_w8a8_rd --quality 5 --inputs 2000

The files are one file cut at every byte, the file with every bit flipped, and files with right checksums
whose streams are random, cut, spliced or repeated. The decoder runs in a process with 8 GiB of memory. A file
is decoded when the image has the size that it states. The end of the process, a hang, and any other exception
than InputError count as a crash.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from tabulate import tabulate

from licq.codec.container import Container
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError
from licq.support.progress import progress

KINDS = ("cut", "flipped bit", "hostile stream")
_MEMORY = 8 * 2**30
_SECONDS = 60  # for a file; one takes a tenth of a second


def hostile(good: Container, draw: random.Random) -> bytes:
    """A file of the same model with right checksums, and a stream that no encoder has written."""
    stream = bytearray(good.streams[0])
    kind = draw.randrange(5)
    if kind == 0:
        stream = bytearray(draw.randbytes(draw.randrange(400)))
    elif kind == 1:
        del stream[draw.randrange(len(stream)) :]
    elif kind == 2:
        for _ in range(draw.randrange(1, 20)):
            stream[draw.randrange(len(stream))] = draw.randrange(256)
    elif kind == 3:
        stream = bytearray([draw.choice((0, 255, 15, 240))]) * draw.randrange(1, 2000)
    else:
        cut = draw.randrange(len(stream))
        stream = stream[cut:] + stream[:cut]
    width, height = draw.choice(((64, 64), (1, 1), (100, 70)))
    return Container(good.model, width, height, good.gain, (bytes(stream),)).to_bytes()


def inputs(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """(kind, file) of all files; the same for the same arguments."""
    for length in range(len(data)):
        yield "cut", data[:length]
    for index in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[index] ^= 1 << bit
            yield "flipped bit", bytes(changed)
    draw, good = random.Random(0), Container.from_bytes(data)
    for _ in range(count):
        yield "hostile stream", hostile(good, draw)


def work(model: str, file: str, count: int, first: int) -> None:
    """Decode the files from number `first` on, and print a line for each: [kind, what became of it]."""
    import resource

    from licq.codec.api import Codec

    codec = Codec.load(model, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for index, (kind, data) in enumerate(inputs(Path(file).read_bytes(), count)):
        if index < first:
            continue
        signal.alarm(_SECONDS)
        try:
            pixels, stated = codec.decode(data), Container.from_bytes(data)
            outcome = "decoded" if tuple(pixels.shape) == (3, stated.height, stated.width) else "crash"
        except InputError as error:
            outcome = "crash" if "\n" in str(error) else "refused"
        except Exception as error:
            print(f"input {index}: {type(error).__name__}: {error}", file=sys.stderr)
            outcome = "crash"
        print(json.dumps([kind, outcome]), flush=True)


def fuzz(model: Path, file: Path, count: int, shown: bool = True) -> Counter:
    """How many files there are of each (kind, what became of it)."""
    kinds = [kind for kind, _ in inputs(file.read_bytes(), count)]
    counts: Counter[tuple[str, str]] = Counter()
    done = 0
    bar = progress(total=len(kinds), desc="decoding", unit="file", enabled=shown)
    while done < len(kinds):
        numbers = (str(model), str(file), str(count), str(done))
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--work", *numbers],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stdout or ():
                kind, outcome = json.loads(line)
                counts[kind, outcome] += 1
                done += 1
                bar.update()
        if done < len(kinds):  # the decoder's process ended at this file
            counts[kinds[done], "crash"] += 1
            done += 1
            bar.update()
    bar.close()
    return counts


def table(counts: Counter) -> str:
    """The counts in Markdown."""
    rows = [[kind, *(counts[kind, outcome] for outcome in ("refused", "decoded", "crash"))] for kind in KINDS]
    return tabulate(rows, ["input", "refused with one line", "decoded", "crashes"], tablefmt="github")


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        model, file, count, first = sys.argv[2:]
        work(model, file, int(count), int(first))
        return 0
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model",
        metavar="RUN",
        required=True,
        help="a model.safetensors, or the folder of a main_ptq.py run",
    )
    parser.add_argument(
        "--quality",
        metavar="Q",
        type=float,
        help="which model of the folder; of a variable-rate codec the rate",
    )
    parser.add_argument(
        "--inputs", metavar="N", type=options.positive, default=1000, help="hostile streams (default: 1000)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    import torch

    from licq.codec.api import Codec
    from licq.data.datasets import open_dataset
    from licq.data.images import load_pixels
    from licq.runs.coding import models_of

    files = {file.parent.name: file for file in models_of(args.model)}
    model = files.get(f"q{args.quality:g}" if args.quality is not None else "") or next(iter(files.values()))
    codec = Codec.load(model, 1)
    pixels = torch.from_numpy(load_pixels(open_dataset("photos").paths[0])).permute(2, 0, 1)[
        :, 100:170, 100:200
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "good.licq"
        file.write_bytes(codec.encode(pixels, args.quality if codec.variable else None))
        counts = fuzz(model, file, args.inputs, not args.quiet)
    print(f"{model}, a file of {pixels.shape[2]}x{pixels.shape[1]} pixels, {sum(counts.values())} inputs\n")
    print(table(counts))
    return 1 if any(outcome == "crash" for _, outcome in counts) else 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
