"""Train the reference checkpoints of the zoo.

    python -m licq.models.train_reference --arch lu2022 --quality 5 --data FOLDER --steps 6000
    python -m licq.models.train_reference --arch lu2022 --quality 6 --data FOLDER --steps 1500 \\
        --init models/zoo/lu2022-q5.safetensors

The loss is R + lambda * 255^2 * mse in bits per pixel (Balle et al. 2018), minimized by Adam with a linear
warm-up and a cosine schedule. The quantiles of the entropy bottleneck have their auxiliary loss. Every crop
and every noise sample follows from the seed and the step, so a run that was interrupted and resumed sees the
same data as one that was not. Photos are decoded once, and crops are drawn while the network computes. On a
GPU `--bf16 --channels_last` suit the official widths.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from licq.models.checkpoints import load_checkpoint, save_checkpoint
from licq.models.narrow import narrow
from licq.models.registry import create_model, get_architecture
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError
from licq.support.files import atomic_path
from licq.support.progress import progress

_SHOWN_EVERY = 20  # steps
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def read_photos(folder: Path, crop: int) -> list[np.ndarray]:
    """The photos of a folder that are as large as a crop, sorted by name, as uint8 arrays (H, W, 3)."""
    paths = (
        sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    )
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    photos = [photo for photo in photos if min(photo.shape[:2]) >= crop]
    if not photos:
        raise InputError(
            f"no photo of at least {crop} x {crop} pixels in {folder}; give another folder as `data`"
        )
    return photos


def draw_batch(photos: list[np.ndarray], batch: int, crop: int, seed: int, step: int) -> Tensor:
    """A batch of random crops, half of them mirrored: (batch, 3, crop, crop) in 0..1; see `draw_pixels`."""
    return _samples(draw_pixels(photos, batch, crop, seed, step))


def draw_pixels(photos: list[np.ndarray], batch: int, crop: int, seed: int, step: int) -> Tensor:
    """A batch of random crops, half of them mirrored: uint8 (batch, crop, crop, 3).

    It depends on the seed and the step alone.
    """
    random = np.random.default_rng((seed, step))
    areas = np.array([photo.shape[0] * photo.shape[1] for photo in photos], dtype=float)
    crops = []
    for index in random.choice(len(photos), size=batch, p=areas / areas.sum()):
        photo = photos[index]
        top, left = (random.integers(0, side - crop + 1) for side in photo.shape[:2])
        piece = photo[top : top + crop, left : left + crop]
        crops.append(piece[:, ::-1] if random.random() < 0.5 else piece)
    return torch.from_numpy(np.stack(crops))


def _samples(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in 0..1."""
    # Contiguous: the backward pass of cheng2020 on channels-last crops corrupts memory in PyTorch 2.15 on
    # AVX2 processors.
    return pixels.permute(0, 3, 1, 2).float().contiguous() / 255


def drawn_ahead(photos: list[np.ndarray], args: argparse.Namespace, first: int) -> Iterator[Tensor]:
    """The batches of steps `first` to `args.steps` on `args.device`, each drawn during the step before.

    uint8 goes to the device, a quarter of the bytes of float.
    """
    on_gpu = torch.device(args.device).type == "cuda"

    def draw(step: int) -> Tensor:
        pixels = draw_pixels(photos, args.batch, args.crop, args.seed, step)
        return pixels.pin_memory() if on_gpu else pixels

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(draw, first)
        for step in range(first, args.steps):
            pixels = following.result()
            if step + 1 < args.steps:
                following = pool.submit(draw, step + 1)
            yield _samples(pixels.to(args.device, non_blocking=True))


def rate_distortion(output: dict, x: Tensor, lmbda: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, bits per pixel, mse on 0..255), means over a batch.

    Args:
        output: of the codec.
        x: images (B, 3, H, W) in 0..1.
        lmbda: of all images, or of each, (B,).
    """
    pixels = x.shape[2] * x.shape[3]
    bits = [-torch.log2(likelihoods).flatten(1).sum(1) for likelihoods in output["likelihoods"].values()]
    bpp = sum(bits[1:], bits[0]) / pixels
    mse = 255**2 * (output["x_hat"] - x).square().flatten(1).mean(1)
    return (bpp + lmbda * mse).mean(), bpp.mean(), mse.mean()


def spread_levels(levels: int, batch: int, seed: int, step: int) -> Tensor:
    """The levels (batch,) of the images of a batch, spread over all levels of a variable-rate codec.

    They depend on the seed and the step alone.
    """
    random = np.random.default_rng((seed, step, 1))
    return torch.from_numpy(1 + (random.integers(levels) + levels * np.arange(batch) // batch) % levels)


def named_alike(source: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of `source` by the names that they have in `model`.

    Names differ where a sequence of layers in `source` has further layers (attention, for one) between those
    of `model`.
    """
    parameters: dict[str, Tensor] = dict(source.named_parameters())
    for name, sequence in model.named_children():
        kinds, others = (
            [type(layer) for layer in part] if isinstance(part, nn.Sequential) else []
            for part in (sequence, getattr(source, name, None))
        )
        if len(others) <= len(kinds):
            continue
        rest = iter(range(len(others)))
        # of each layer of `model` the index that it has in `source`
        indexes = [next((index for index in rest if others[index] is kind), None) for kind in kinds]
        if None in indexes:
            continue
        inside = {key: parameters.pop(key) for key in list(parameters) if key.startswith(f"{name}.")}
        for index, other in enumerate(indexes):
            prefix = f"{name}.{other}."
            parameters |= {
                f"{name}.{index}.{key.removeprefix(prefix)}": parameter
                for key, parameter in inside.items()
                if key.startswith(prefix)
            }
    return parameters


def start_from(model: nn.Module, source: nn.Module, batches: list[Tensor]) -> None:
    """Give `model` the weights of a trained codec.

    What that codec does not have keeps its initial values, and is printed.

    Args:
        batches: (B, 3, H, W) in 0..1, for the statistics that narrowing a wider codec takes.

    Raises:
        InputError: the two have no layer in common.
    """
    parameters, given = dict(model.named_parameters()), named_alike(source, model)
    common = parameters.keys() & given.keys()
    if not common:
        raise InputError(
            "the checkpoint of `init` has no layer in common with `arch`; start from another checkpoint"
        )
    if any(parameters[name].shape != given[name].shape for name in common):
        common = narrow(source, model, batches)
    else:
        with torch.no_grad():
            for name in common:
                parameters[name].copy_(given[name])
    lacking = sorted({name.rpartition(".")[0] or name for name in parameters.keys() - common})
    if lacking:
        print(f"not in --init, trained from the start: {', '.join(lacking)}")


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The learning rate of a step: a linear warm-up, then a half cosine down to 1% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    turn = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * turn)))


def train(
    model: nn.Module,
    photos: list[np.ndarray],
    args: argparse.Namespace,
    lmbda: float | list[float],
    state_path: Path,
) -> float:
    """Train in place, and go on from `state_path` where that file exists.

    Args:
        lmbda: of the codec; of a variable-rate codec a list, those of its levels.
        state_path: the file from which training can be resumed.

    Returns:
        The seconds spent, those of earlier runs included.
    """
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    network: Any = model.to(args.device, memory_format=layout).train()
    quantiles = [p for name, p in model.named_parameters() if name.endswith("quantiles")]
    weights = [p for name, p in model.named_parameters() if not name.endswith("quantiles")]
    fused = torch.device(args.device).type == "cuda"  # one kernel for all weights
    optimizer = torch.optim.Adam(weights, lr=args.lr, fused=fused)
    auxiliary = torch.optim.Adam(quantiles, lr=1e-3, fused=fused)
    first, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        auxiliary.load_state_dict(state["auxiliary"])
        first, seconds = state["step"], state["seconds"]
    autocast = torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.bf16)
    started, spent_before = time.monotonic(), seconds
    averages: Tensor | None = None
    bar = progress(range(first, args.steps), desc=f"{args.arch} q{args.quality}")
    for step, x in zip(bar, drawn_ahead(photos, args, first), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        x = x.contiguous(memory_format=layout)
        torch.manual_seed(args.seed * 1_000_003 + step)
        if isinstance(lmbda, list):
            levels = spread_levels(len(lmbda), len(x), args.seed, step)
            weight = torch.tensor(lmbda, device=x.device)[levels - 1]
            batch = network.with_planes(x, levels, weight)
        else:
            batch, weight = x, lmbda
        with autocast:
            output = network(batch)
        output = {
            "x_hat": output["x_hat"].float(),
            "likelihoods": {k: v.float() for k, v in output["likelihoods"].items()},
        }
        loss, bpp, mse = rate_distortion(output, x, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        auxiliary.zero_grad()
        network.aux_loss().backward()
        auxiliary.step()
        with torch.no_grad():
            now = torch.stack([loss, bpp, 10 * torch.log10(255**2 / mse)])
            averages = now if averages is None else 0.98 * averages + 0.02 * now
        if step % _SHOWN_EVERY == 0:  # reading a number waits for the GPU
            shown = zip(("loss", "bpp", "psnr"), averages.tolist(), strict=True)
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown}, refresh=False)
        seconds = spent_before + time.monotonic() - started
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            with atomic_path(state_path) as path:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "auxiliary": auxiliary.state_dict(),
                        "step": step + 1,
                        "seconds": seconds,
                    },
                    path,
                )
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m licq.models.train_reference", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--arch", default="lu2022")
    parser.add_argument(
        "--quality",
        type=int,
        default=5,
        help="sets lambda (default: 5, lambda 0.025); without effect on a "
        "variable-rate codec, which is trained for all of its levels",
    )
    parser.add_argument(
        "--configuration", default="reference", help="a named size; 'official' for the published one"
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder of photos")
    parser.add_argument(
        "--init",
        type=Path,
        help="a checkpoint to start from: of this architecture, of one "
        "that shares layers with it, or of a wider one, which is narrowed",
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 autocast; pays on processors that have it"
    )
    parser.add_argument(
        "--channels_last",
        action="store_true",
        help="weights and crops in the layout of a GPU's convolutions in bfloat16",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save_every", type=int, default=250)
    parser.add_argument("--state", type=Path, default=Path("runs/zoo"), help="folder of the resume files")
    parser.add_argument("--out", type=Path, default=Path("models/zoo"))
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    architecture = get_architecture(args.arch)
    torch.manual_seed(args.seed)
    configuration = None if args.configuration == "official" else args.configuration
    model: Any = create_model(args.arch, args.quality, configuration)
    levels = range(1, model.levels + 1) if architecture.variable else [args.quality]
    lambdas = [architecture.lambda_for(level) for level in levels]
    photos = read_photos(args.data, args.crop)
    name = (
        args.arch
        + ("" if configuration else "-official")
        + ("" if architecture.variable else f"-q{args.quality}")
    )
    state_path = args.state / f"{name}.train.pt"
    if args.init and not state_path.exists():
        others = range(args.steps, args.steps + 12)  # crops that training will not see
        start_from(
            model,
            load_checkpoint(args.init),
            [draw_batch(photos, 4, args.crop, args.seed, step) for step in others],
        )
    seconds = train(model, photos, args, lambdas if architecture.variable else lambdas[0], state_path)
    model.cpu().eval()
    model.update(force=True)
    metadata = {
        "arch": args.arch,
        "kwargs": dict(architecture.sizes(args.quality, configuration)),
        **(
            {"lambdas": lambdas} if architecture.variable else {"quality": args.quality, "lambda": lambdas[0]}
        ),
        "metric": "mse",
        "steps": args.steps,
        "batch": args.batch,
        "crop": args.crop,
        "seed": args.seed,
        "init": args.init.name if args.init else None,
        "seconds": round(seconds),
        "photos": len(photos),
    }
    save_checkpoint(model, args.out / f"{name}.safetensors", metadata)
    print(f"wrote {args.out / name}.safetensors after {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main_guard(main))
