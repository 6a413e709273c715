"""A codec of your own: Balle, Laparra, Simoncelli 2017 as a plain `nn.Module`, for which licq has no line.

    import licq
    from bls2017 import BLS2017

    codec = BLS2017.load("checkpoints/bls2017", quality=3)
    qmodel = licq.quantize(codec, "photos", lmbda=0.023)        # a folder of images
    qmodel.save("bls2017_w8a8.safetensors")                     # integers only
    qmodel = licq.QuantModel.load("bls2017_w8a8.safetensors", model=BLS2017())

On the command line, the path of this file takes the place of an architecture's name:

    python main_ptq.py --arch examples/bls2017.py --checkpoint checkpoints/bls2017/transform.safetensors

checkpoints/bls2017/ has trained weights that sjtu-tcloud published under the MIT licence, converted:
transform.safetensors, and an entropy model for each of four steps. One transform serves four rates: y is
divided by a step before it is rounded.
"""

from pathlib import Path

from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN1
from torch import Tensor, nn

from licq.models.checkpoints import fill_network, read_state_dict
from licq.models.registry import register_model
from licq.support.errors import InputError

STEPS = {1: 8, 2: 4, 3: 2, 4: 1}  # quality -> step of y

# The codec was not trained for these. Each is the slope -dR/dD of the codec's own R-D curve at a step, with R
# in bits per pixel and D the mean squared error of samples in 0..255.
LAMBDAS = {"mse": {1: 0.0035, 2: 0.0070, 3: 0.023, 4: 0.054}}


@register_model(
    "bls2017",
    title="End-to-end Optimized Image Compression",
    paper="arXiv 1611.01704",
    official={quality: {"N": 128} for quality in STEPS},
    configurations={"reference": {"N": 32}},
    multiple=16,
    lambdas=LAMBDAS,
    infer=lambda state_dict: {"N": state_dict["g_a.0.weight"].shape[0]},
    loader=lambda path, quality: BLS2017.load(path if path.is_dir() else path.parent, quality),
)
class BLS2017(nn.Module):
    """Three convolutions with GDN1 between them in each direction, and a factorized prior.

    Args:
        N: channels of every stage and of the latent y.
    """

    def __init__(self, N: int = 128):
        super().__init__()
        self.g_a = nn.Sequential(
            nn.Conv2d(3, N, 9, stride=4, padding=4),
            GDN1(N),
            nn.Conv2d(N, N, 5, stride=2, padding=2),
            GDN1(N),
            nn.Conv2d(N, N, 5, stride=2, padding=2, bias=False),
        )
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(N, N, 5, stride=2, padding=2, output_padding=1),
            GDN1(N, inverse=True),
            nn.ConvTranspose2d(N, N, 5, stride=2, padding=2, output_padding=1),
            GDN1(N, inverse=True),
            nn.ConvTranspose2d(N, 3, 9, stride=4, padding=4, output_padding=3),
        )

    def forward(self, x: Tensor) -> dict:
        """x: (B, 3, H, W) in 0..1, H and W multiples of 16.

        Returns:
            {"x_hat": of the same shape, "likelihoods": {"y": (B, N, H/16, W/16)}}.
        """
        y = self.g_a(x)
        y_hat, y_likelihoods = self.entropy_bottleneck(y)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods}}

    def update(self) -> None:
        """Make the tables of the entropy coder."""
        self.entropy_bottleneck.update()

    @classmethod
    def load(cls, folder: str | Path, quality: int | None) -> "BLS2017":
        """The codec of one rate (1 lowest, 4 highest) from the folder of the published weights, in eval mode.

        Raises:
            InputError: no such quality, or files that are missing or damaged.
        """
        if quality not in STEPS:
            raise InputError(f"bls2017 has no quality {quality!r}; choose `quality` from 1 to {len(STEPS)}")
        step = STEPS[quality]
        weights = read_state_dict(Path(folder) / "transform.safetensors")
        prior = read_state_dict(Path(folder) / f"entropy_bottleneck_step{step}.safetensors")
        # y / step is coded, and step * y_hat is decoded. Both are linear, so the layers next to them do it.
        weights["g_a.4.weight"] = weights["g_a.4.weight"] / step
        weights["g_s.0.weight"] = weights["g_s.0.weight"] * step
        model = cls(N=weights["g_a.0.weight"].shape[0]).eval()
        fill_network(
            model, {**weights, **{f"entropy_bottleneck.{name}": prior[name] for name in prior}}, folder
        )
        return model
