"""A codec of your own with a hyperprior: the mean-scale codec that asv-ntut exported for small satellites.

    import licq
    from tic_n32 import TicN32

    codec = TicN32.load("tic_n32_fp32.npz", quality=4)
    qmodel = licq.quantize(codec, "photos", lmbda=0.014)        # a folder of images
    qmodel.save("tic_n32_w8a8.safetensors")                     # integers only
    qmodel = licq.QuantModel.load("tic_n32_w8a8.safetensors", model=TicN32())

On the command line, the path of this file takes the place of an architecture's name:

    python main_ptq.py --arch examples/tic_n32.py --checkpoint tic_n32_fp32.npz --quality all

tic_n32_fp32.npz has the weights of CNN-based_Image_Compression (scripts/onnx_models_d_N32, Apache-2.0) as
arrays of NumPy. It has no density of z, only the tables of the codec's own coder: `TabulatedBottleneck` takes
these. One transform serves four rates: y is divided by a step before it is rounded.
"""

import statistics
import sys
from pathlib import Path

import torch
from compressai.entropy_models import GaussianConditional
from compressai.layers import GDN
from compressai.models.base import get_scale_table
from torch import Tensor, nn

import licq
from licq.models.checkpoints import fill_network, read_state_dict
from licq.models.layers import TabulatedBottleneck
from licq.models.registry import register_model
from licq.support.cli import ArgumentParser, main_guard
from licq.support.errors import InputError

STEPS = {1: 4.0, 2: 2.5, 3: 1.6, 4: 1.0}  # quality -> step of y; 1 is the published codec

# The slope -dR/dD of the codec's own R-D curve at each step, with R in bits per pixel and D the mean squared
# error of samples in 0..255. `python examples/tic_n32.py CHECKPOINT kodak` prints them.
LAMBDAS = {"mse": {1: 0.00088, 2: 0.0021, 3: 0.0051, 4: 0.014}}

_TABLES = {"CDF": "_quantized_cdf", "LENGTH": "_cdf_length", "OFFSET": "_offset"}
_AROUND_Y = {  # weights -> power of the step that they take
    "g_a.6.weight": -1,
    "g_a.6.bias": -1,
    "h_a.0.weight": 1,
    "h_s.4.weight": -1,
    "h_s.4.bias": -1,
    "g_s.0.0.weight": 1,
}


def up(channels: int, out: int) -> nn.Sequential:
    """A 5x5 convolution and PixelShuffle: (B, channels, H, W) -> (B, out, 2H, 2W)."""
    return nn.Sequential(nn.Conv2d(channels, 4 * out, 5, padding=2), nn.PixelShuffle(2))


def down(channels: int, out: int) -> nn.Conv2d:
    """A 5x5 convolution of stride 2."""
    return nn.Conv2d(channels, out, 5, stride=2, padding=2)


@register_model(
    "tic_n32",
    title="CNN-based Image Compression, distilled, N = 32",
    paper="https://github.com/asv-ntut/CNN-based_Image_Compression",
    official={quality: {"N": 32, "M": 192} for quality in STEPS},
    configurations={"reference": {"N": 16, "M": 24}},
    multiple=64,
    lambdas=LAMBDAS,
    infer=lambda weights: {"N": weights["g_a.0.weight"].shape[0], "M": weights["g_a.6.weight"].shape[0]},
    loader=lambda path, quality: TicN32.load(path, quality),
)
class TicN32(nn.Module):
    """Convolutions with GDN between them, and a mean-scale hyperprior (Minnen 2018).

    Args:
        N: channels of the stages and of z.
        M: channels of y.
    """

    def __init__(self, N: int = 32, M: int = 192):
        super().__init__()
        self.g_a = nn.Sequential(down(3, N), GDN(N), down(N, N), GDN(N), down(N, N), GDN(N), down(N, M))
        self.h_a = nn.Sequential(nn.Conv2d(M, N, 3, padding=1), nn.ReLU(), down(N, N), nn.ReLU(), down(N, N))
        self.h_s = nn.Sequential(up(N, N), nn.ReLU(), up(N, N), nn.ReLU(), nn.Conv2d(N, 2 * M, 3, padding=1))
        self.g_s = nn.Sequential(
            up(M, N),
            GDN(N, inverse=True),
            up(N, N),
            GDN(N, inverse=True),
            up(N, N),
            GDN(N, inverse=True),
            up(N, 3),
        )
        self.entropy_bottleneck = TabulatedBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)

    def forward(self, x: Tensor) -> dict:
        """x: (B, 3, H, W) in 0..1, H and W multiples of 64.

        Returns:
            {"x_hat": of the same shape, "likelihoods": {"y": (B, M, H/16, W/16), "z": (B, N, H/64, W/64)}}.
        """
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(torch.abs(y)))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means=means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def update(self) -> None:
        """Make the tables of the entropy coder of y; z has its own."""
        self.gaussian_conditional.update_scale_table(get_scale_table())

    @classmethod
    def load(cls, path: str | Path, quality: int | None) -> "TicN32":
        """The codec of one rate (1 lowest, 4 highest) from the published file, in eval mode.

        Raises:
            InputError: no such quality, or a file that is missing or damaged.
        """
        if quality not in STEPS:
            raise InputError(f"tic_n32 has no quality {quality!r}; choose `quality` from 1 to {len(STEPS)}")
        return cls.at_step(path, STEPS[quality])

    @classmethod
    def at_step(cls, path: str | Path, step: float) -> "TicN32":
        """The codec whose y is divided by a step before it is rounded, and multiplied by it after that.

        Raises:
            InputError: the file is missing or damaged, or holds other weights.
        """
        stored = read_state_dict(path)
        try:
            model = cls(N=stored["g_a.0.weight"].shape[0], M=stored["g_a.6.weight"].shape[0]).eval()
            weights = {name: stored[name] for name in stored if name.endswith((".weight", ".bias"))}
            for name, layer in model.named_modules():
                if isinstance(layer, GDN):  # the file has what CompressAI's parametrization gives
                    weights[f"{name}.beta"] = layer.beta_reparam.init(stored[f"{name}.beta_effective"])
                    weights[f"{name}.gamma"] = layer.gamma_reparam.init(stored[f"{name}.gamma_effective"])
            for name, buffer in _TABLES.items():
                weights[f"entropy_bottleneck.{buffer}"] = stored[f"cdf.FIXED_EB_{name}"]
            weights["entropy_bottleneck.medians"] = stored["cdf.FIXED_EB_MEDIANS"].flatten()
            # The layers around y divide and multiply by the step: all of them are linear.
            for name, factor in _AROUND_Y.items():
                weights[name] = weights[name] * step**factor
        except KeyError as error:
            raise InputError(f"{path} has no {error}; give the weights of tic_n32") from error
        fill_network(model, weights, path)
        return model


def main(path: str, images: str) -> None:
    """Print rate, distortion and lambda of each quality.

    Lambda is the slope between steps that are 1.2 times as large and as small.

    Args:
        images: a folder, or the name of a data set.
    """
    print("quality  step     bpp    PSNR   lambda")
    for quality, step in STEPS.items():
        here, large, small = (
            licq.evaluate(TicN32.at_step(path, s), images) for s in (step, 1.2 * step, step / 1.2)
        )
        rates, errors = (
            [statistics.fmean(getattr(image, key) for image in report.per_image) for report in (large, small)]
            for key in ("bpp", "mse")
        )
        slope = (rates[1] - rates[0]) / (errors[0] - errors[1])
        mean = here.mean()
        print(f"{quality:7} {step:5} {mean['bpp']:7.4f} {mean['psnr']:7.3f} {slope:8.5f}", flush=True)


def command() -> int:
    """The command line."""
    parser = ArgumentParser(description="Rate, distortion and lambda of each quality.", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="tic_n32_fp32.npz")
    parser.add_argument("images", metavar="IMAGES", help="a folder, or the name of a data set")
    args = parser.parse_args()
    main(args.checkpoint, args.images)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(command))
