"""Do two checkouts compute the same numbers? Small runs of every embedded codec, their hashes and results as
JSON.

    python benchmarks/same_numbers.py --root CHECKOUT --json before.json     # once in each, on one machine
    python benchmarks/same_numbers.py --compare before.json after.json       # status 1 where they differ

A run quantizes on two crops, measures two small photographs, writes a file of one and decodes it. Stored are
the points of report.json without times and memory, and hashes of the model's tensors, of the file and of the
decoded pixels. Numbers that are learned depend on the processor and on PyTorch, so both checkouts have to be
run on one machine.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

RUNS = {
    "lu2022": ["--arch", "lu2022", "--quality", "5"],
    "minnen2018": ["--arch", "minnen2018", "--quality", "5"],
    "balle2018": ["--arch", "balle2018", "--quality", "5"],
    "cheng2020": ["--arch", "cheng2020", "--quality", "3"],
    "tic": ["--arch", "tic", "--quality", "3"],
    "qvrf-minnen2018": ["--arch", "qvrf-minnen2018", "--quality", "2,5"],
    "lu2022-w6a6-strict": [
        "--arch",
        "lu2022",
        "--quality",
        "5",
        "--w_bits",
        "6",
        "--a_bits",
        "6",
        "--strict_int8",
    ],
    "lu2022-w8a16-mse": ["--arch", "lu2022", "--quality", "1", "--a_bits", "16", "--loss", "mse"],
    "minnen2018-brecq-w4a8": [
        "--arch",
        "minnen2018",
        "--quality",
        "5",
        "--w_bits",
        "4",
        "--preset",
        "brecq",
        "--iters",
        "3",
    ],
    "minnen2018-aquant": ["--arch", "minnen2018", "--quality", "1", "--preset", "aquant", "--iters", "2"],
    "balle2018-rdo-ptq-integer": [
        "--arch",
        "balle2018",
        "--quality",
        "5",
        "--preset",
        "rdo-ptq-integer",
        "--iters",
        "2",
        "--bias_bits",
        "8",
    ],
    "cheng2020-sun2020": [
        "--arch",
        "cheng2020",
        "--quality",
        "3",
        "--preset",
        "sun2020",
        "--set",
        "a_scales=folded",
    ],
    "tic-fq-vit": ["--arch", "tic", "--quality", "3", "--preset", "fq-vit"],
    "lu2022-repq-vit": ["--arch", "lu2022", "--quality", "3", "--preset", "repq-vit"],
}
SMALL = ["--num_calib", "2", "--crops_per_image", "1", "--crop", "64", "--set", "joint_iters=2", "--quiet"]
VOLATILE = {
    "calibration_seconds",
    "peak_memory_mb",
    "seconds",
    "model",
    "path",
    "versions",
    "model_bytes",
    "created",
    "model_sha256",
    "model_identity",
    "seconds_by_step",
    "resumed_seconds",
}


def without_volatile(value):
    """Times, memory and paths left out; also `licq`, the version."""
    if isinstance(value, dict):
        return {key: without_volatile(part) for key, part in value.items() if key not in VOLATILE | {"licq"}}
    return [without_volatile(part) for part in value] if isinstance(value, list) else value


def photographs(folder: Path) -> None:
    import skimage.data

    folder.mkdir(parents=True)
    for name, (top, left, height, width) in {
        "astronaut": (0, 150, 128, 192),
        "coffee": (60, 200, 192, 128),
    }.items():
        Image.fromarray(getattr(skimage.data, name)()[top : top + height, left : left + width]).save(
            folder / f"{name}.png"
        )


HASHES = """
import hashlib, sys
try:
    from licq.models.checkpoint_files import read_tensors
except ImportError:  # before there was one import name
    from models.checkpoint_files import read_tensors
digest = hashlib.sha256()
for name, tensor in sorted(read_tensors(sys.argv[1])[0].items()):
    tensor = tensor.contiguous()
    digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""
"""Prints a hash of the tensors of a model's file, as they are when they are unpacked."""


def measure(root: Path, flags: list[str], folder: Path, pictures: Path) -> dict:
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "LICQ_CACHE": str(folder / "cache"),
    }

    def call(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: status {done.returncode}\n{done.stderr[-2000:]}")
        return done.stdout

    run = folder / "run"
    call("main_ptq.py", *flags, *SMALL, "--threads", "1", "--eval", str(pictures), "--out", str(run))
    report = json.loads((run / "report.json").read_text())
    models = {
        str(file.relative_to(run)): call("-c", HASHES, str(file)).strip()
        for file in sorted(run.rglob("model.safetensors"))
    }
    quality = flags[flags.index("--quality") + 1].split(",")[-1]
    image = pictures / "coffee.png"
    call(
        "main_eval.py",
        "encode",
        str(image),
        "-o",
        str(folder / "x.licq"),
        "--model",
        str(run),
        "--quality",
        quality,
    )
    call("main_eval.py", "decode", str(folder / "x.licq"), "-o", str(folder / "x.png"), "--model", str(run))
    # the header of a file holds the hash of the model's file, which holds times: only what follows is
    # compared
    payload = (folder / "x.licq").read_bytes()
    pixels = np.asarray(Image.open(folder / "x.png").convert("RGB"))
    return {
        "points": without_volatile(report["points"]),
        "bd_rate_psnr": report.get("bd_rate_psnr"),
        "models": models,
        "file_bytes": len(payload),
        "file_sha256": hashlib.sha256(payload[-(len(payload) * 3 // 4) :]).hexdigest(),
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def differences(before, after, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in differences(before.get(key), after.get(key), f"{where}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for index, pair in enumerate(zip(before, after))
            for line in differences(*pair, f"{where}/{index}")
        ]
    return (
        []
        if before == after or (before != before and after != after)
        else [f"{where}: {str(before)[:70]} -> {str(after)[:70]}"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[1],
        help="the checkout to run (default: this one)",
    )
    parser.add_argument(
        "--json", type=Path, help="where results are stored, and taken up when a run was interrupted"
    )
    parser.add_argument("--only", nargs="*", help="names of runs (default: all)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    args = parser.parse_args()
    if args.compare:
        before, after = (json.loads(file.read_text()) for file in args.compare)
        names = [name for name in before if name in after]
        lines = [line for name in names for line in differences(before[name], after[name], name)]
        print("\n".join(lines) or f"equal: {', '.join(names)}")
        return int(bool(lines))
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name, flags in RUNS.items():
        if name in results or args.only and name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            photographs(Path(folder) / "pictures")
            results[name] = measure(args.root.resolve(), flags, Path(folder), Path(folder) / "pictures")
        print(name, results[name]["file_sha256"][:12], results[name]["pixels_sha256"][:12], flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
