"""CompressAI's codecs, with the published sizes (compressai.zoo.image.cfgs).

They are CompressAI's classes. Those with a context model estimate the rate of the y_hat that they use; see
`models.layers.WholeGaussianConditional`.
"""

from collections.abc import Mapping

from compressai.models import (
    Cheng2020Anchor,
    Cheng2020Attention,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from torch import Tensor

from licq.models.layers import WholeLatent
from licq.models.registry import register_model


def _sizes(
    narrow: dict[str, int], wide: dict[str, int], first_wide: int, last: int
) -> dict[int, dict[str, int]]:
    """quality -> sizes, 1..last: `narrow` below the quality `first_wide`, `wide` from there on."""
    return {quality: wide if quality >= first_wide else narrow for quality in range(1, last + 1)}


def infer_n_m(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """N and M of a network whose g_a is four strided convolutions with GDN between them."""
    return {"N": state_dict["g_a.0.weight"].shape[0], "M": state_dict["g_a.6.weight"].shape[0]}


def infer_n(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """N of a network of Cheng et al. 2020."""
    return {"N": state_dict["g_a.0.conv1.weight"].shape[0]}


class Minnen2018(WholeLatent, JointAutoregressiveHierarchicalPriors):
    """Joint autoregressive and hierarchical priors; the arguments N and M are CompressAI's."""


class Cheng2020(WholeLatent, Cheng2020Attention):
    """Residual units with attention; the argument N is CompressAI's."""


class Cheng2020WithoutAttention(WholeLatent, Cheng2020Anchor):
    """Residual units without attention; the argument N is CompressAI's."""


register_model(
    "balle2018",
    ScaleHyperprior,
    title="Variational Image Compression with a Scale Hyperprior",
    paper="arXiv 1802.01436",
    official=_sizes({"N": 128, "M": 192}, {"N": 192, "M": 320}, first_wide=6, last=8),
    configurations={"reference": {"N": 56, "M": 80}},
    infer=infer_n_m,
    zoo="bmshj2018-hyperprior",
)

register_model(
    "minnen2018",
    Minnen2018,
    title="Joint Autoregressive and Hierarchical Priors for Learned Image Compression",
    paper="arXiv 1809.02736",
    official=_sizes({"N": 192, "M": 192}, {"N": 192, "M": 320}, first_wide=5, last=8),
    configurations={"reference": {"N": 48, "M": 64}},
    infer=infer_n_m,
    zoo="mbt2018",
)

register_model(
    "minnen2018-mean",
    MeanScaleHyperprior,
    title="Joint Autoregressive and Hierarchical Priors for Learned Image Compression "
    "(without context model)",
    paper="arXiv 1809.02736",
    official=_sizes({"N": 128, "M": 192}, {"N": 192, "M": 320}, first_wide=5, last=8),
    configurations={"reference": {"N": 48, "M": 64}},
    infer=infer_n_m,
    zoo="mbt2018-mean",
)

_CHENG_TITLE = "Learned Image Compression with Discretized Gaussian Mixture Likelihoods and Attention Modules"

register_model(
    "cheng2020",
    Cheng2020,
    title=_CHENG_TITLE,
    paper="arXiv 2001.01568",
    official=_sizes({"N": 128}, {"N": 192}, first_wide=4, last=6),
    configurations={"reference": {"N": 36}},
    infer=infer_n,
    zoo="cheng2020-attn",
)

register_model(
    "cheng2020-anchor",
    Cheng2020WithoutAttention,
    title=f"{_CHENG_TITLE} (without attention)",
    paper="arXiv 2001.01568",
    official=_sizes({"N": 128}, {"N": 192}, first_wide=4, last=6),
    configurations={"reference": {"N": 36}},
    infer=infer_n,
    zoo="cheng2020-anchor",
)
