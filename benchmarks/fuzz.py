"""Damaged and hostile .licq files against the decoder: how many it refuses, decodes to an image of the stated
size, or dies of.

    python benchmarks/fuzz.py --model runs/minnen2018_w8a8_rd --quality 5 --inputs 2000

Every cut and every flipped bit of one file, then files whose checksums are right and whose streams are
random, cut, spliced, repeated. The decoder runs in a process of its own with 8 GiB of memory; a death, a hang
or any other exception counts as a crash.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate

from licq.codec.container import Container
from licq.support import options
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError
from licq.support.progress import progress

KINDS = ("cut", "flipped bit", "hostile stream")
_MEMORY = 8 * 2**30
_SECONDS = 60  # of one file, which takes a tenth of one


def hostile(good: Container, draw: random.Random) -> bytes:
    """A file of the same model with right checksums: a stream that no encoder has written, and perhaps
    another size."""
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
    """(kind, file) of everything that is tried; the same for the same arguments."""
    for length in range(len(data)):
        yield "cut", data[:length]
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            yield "flipped bit", bytes(changed)
    draw, good = random.Random(0), Container.from_bytes(data)
    for _ in range(count):
        yield "hostile stream", hostile(good, draw)


def work(model: str, file: str, count: int, first: int) -> None:
    """Decode the inputs from number `first` on; one line for each on standard output: its kind and what
    became of it."""
    import resource

    from licq.codec.api import Codec

    codec = Codec.load(model, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for place, (kind, data) in enumerate(inputs(Path(file).read_bytes(), count)):
        if place < first:
            continue
        signal.alarm(_SECONDS)
        try:
            pixels, stated = codec.decode(data), Container.from_bytes(data)
            found = "decoded" if tuple(pixels.shape) == (3, stated.height, stated.width) else "crash"
        except InputError as error:
            found = "crash" if "\n" in str(error) else "refused"
        except Exception as error:
            print(f"input {place}: {type(error).__name__}: {error}", file=sys.stderr)
            found = "crash"
        print(json.dumps([kind, found]), flush=True)


def fuzz(model: Path, file: Path, count: int, shown: bool = True) -> Counter:
    """(kind, what became of it) -> how many."""
    every, found = [kind for kind, _ in inputs(file.read_bytes(), count)], Counter()
    done = 0
    bar = progress(total=len(every), desc="decoding", unit="file", enabled=shown)
    while done < len(every):
        with subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--work",
                str(model),
                str(file),
                str(count),
                str(done),
            ],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stdout:
                found[tuple(json.loads(line))] += 1
                done += 1
                bar.update()
        if done < len(every):  # it died of this one
            found[every[done], "crash"] += 1
            done += 1
            bar.update()
    bar.close()
    return found


def table(found: Counter) -> str:
    rows = [[kind, *(found[kind, what] for what in ("refused", "decoded", "crash"))] for kind in KINDS]
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
        found = fuzz(model, file, args.inputs, not args.quiet)
    print(
        f"{model}, a file of {pixels.shape[2]}x{pixels.shape[1]} pixels, {sum(found.values())} inputs\n\n{table(found)}"
    )
    return 1 if any(what == "crash" for _, what in found) else 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
