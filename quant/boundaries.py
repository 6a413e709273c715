"""The codec's boundaries on integers: rounding of y and z, entropy bottleneck, Gaussian conditional.

y, z, means and scales are requantized from their accumulators to integers in units of 2^-boundary_bits
(design, section 3). Likelihoods are estimates in float for the rate: no symbol and no pixel depends on them.
"""

from collections.abc import Mapping
from typing import Any

from compressai.entropy_models import EntropyBottleneck, GaussianConditional, GaussianMixtureConditional
from torch import Tensor, nn

from licq.models.checkpoint_files import CDF_STATE
from licq.models.layers import RoundAboutMeans, TabulatedBottleneck, WholeGaussianConditional
from licq.models.vbr import VariableBottleneck
from licq.quant.config import QuantConfig
from licq.quant.density import (
    BottleneckTables,
    DensityTables,
    bottleneck_tables,
    density_tables,
    factorized_table,
)
from licq.quant.fixedpoint import round_half_away, round_ste
from licq.quant.latents import rounded, to_symbols
from licq.quant.modules import QuantModule, replaces
from licq.quant.primitives import (
    add,
    boundary,
    constant,
    likelihood,
    rescale,
    subtract,
)
from licq.quant.qtensor import QTensor, to_real
from licq.quant.quantizer import Quantizer
from licq.support.errors import InputError

_BOUNDARY_RANGE_BITS = 24  # integers of so many bits stay exact in float32


def boundary_quantizer(config: QuantConfig) -> Quantizer:
    """The quantizer of tensors at boundaries, whose step is fixed at 2^-boundary_bits."""
    return Quantizer(_BOUNDARY_RANGE_BITS, config.frac_bits, fixed=2.0**-config.boundary_bits)


class QuantBoundary(QuantModule):
    """A point where a latent is rounded. Its inputs are brought to integers in units of `unit`,
    2^-boundary_bits."""

    gives_latents = True
    module: Any
    """The entropy model that stood here; subclasses state its type."""

    def __init__(self, module: nn.Module | None, config: QuantConfig):
        super().__init__(config)
        self.module = module
        self.unit = 2.0**-config.boundary_bits
        self.grid = boundary_quantizer(config)

    def likelihood_of_coded(
        self, symbols: Tensor, densities: Mapping[str, Tensor], step: Tensor | None = None
    ) -> Tensor:
        """The estimated likelihoods of symbols that the integer program has computed, as `forward` gives
        them.

        Args:
            symbols: integers (1, C, H, W).
            densities: "scales", "means", "weights" as far as the model has them: integers in units of
                `unit`.
            step: of the symbols of z in a codec of variable rate, (1, 1, 1, 1).
        """
        raise NotImplementedError

    def latent(self, values: Tensor, like: QTensor) -> QTensor:
        """Integers in units of `unit` as y_hat or z_hat."""
        return QTensor(values, like.scale, like.runtime, latent=True)


@replaces(RoundAboutMeans)
class QuantRound(QuantBoundary):
    """round(x - means) + means: the values that the decoder will have."""

    kind = "round"

    def real(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        return rounded(x, means)[1]

    def integer(self, x: QTensor, means: QTensor | Tensor | None = None) -> QTensor:
        if isinstance(means, Tensor):
            means = QTensor(means, None, self.runtime)
        x, mean = self.grid(x), None if means is None else self.grid(means).q
        symbols, values = to_symbols(x.q, mean, self.unit)
        boundary("round", self.name, x.q, symbols, values, means=mean)
        return self.latent(values, x)


@replaces(EntropyBottleneck)
class QuantEntropyBottleneck(QuantBoundary):
    """EntropyBottleneck (Balle 2018): z_hat from integers, its likelihood under the learned factorized
    density.

    replaced: the tables that the checkpoint held were not those of its densities. Freezing makes them anew.
    """

    kind = "entropy_bottleneck"
    module: EntropyBottleneck
    replaced = False

    def freeze(self) -> None:
        super().freeze()
        self.make_tables()

    def make_tables(self) -> None:
        """Make the tables with which symbols are coded from the densities.

        Raises:
            InputError: the densities have no tables.
        """
        try:
            made = bottleneck_tables(self.module)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        had = self.tables
        self.replaced |= had is not None and made.differ(had)
        device = self.module._get_medians().device
        for name, table in zip(CDF_STATE, (made.cdf, made.offsets, made.lengths), strict=True):
            self.module._buffers[name] = table.to(device)

    @property
    def tables(self) -> BottleneckTables | None:
        """The tables with which symbols are coded; None where there are none."""
        cdf, offsets, lengths = (self.module.get_buffer(name) for name in CDF_STATE)
        return BottleneckTables(cdf, lengths, offsets) if cdf.numel() else None

    def forward(self, x, training=None):
        return super().forward(x)

    def _get_medians(self) -> Tensor:
        return self.module._get_medians()

    def _medians_for(self, x: Tensor) -> Tensor:
        return self.module._get_medians().detach().reshape(1, -1, *[1] * (x.ndim - 2))

    def _likelihood_of(self, z_hat: Tensor) -> Tensor:
        rows = z_hat.transpose(0, 1).reshape(z_hat.shape[1], 1, -1)
        likelihood, _, _ = self.module._likelihood(rows)
        if self.module.use_likelihood_bound:
            likelihood = self.module.likelihood_lower_bound(likelihood)
        return likelihood.reshape(z_hat.shape[1], z_hat.shape[0], *z_hat.shape[2:]).transpose(0, 1)

    def real(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z_hat = rounded(z, self._medians_for(z))[1]
        return z_hat, self._likelihood_of(z_hat)

    def integer_medians(self, z: Tensor) -> Tensor:
        """The medians in units of `unit`."""
        return constant(round_ste(self._medians_for(z) / self.unit), self.runtime.tracer)

    def likelihood_of_coded(
        self, symbols: Tensor, densities: Mapping[str, Tensor], step: Tensor | None = None
    ) -> Tensor:
        medians = round_half_away(self._medians_for(symbols) / self.unit) * self.unit
        return self._likelihood_of((symbols + medians).to(medians.dtype))

    def integer(self, z: QTensor) -> tuple[QTensor, Tensor]:
        z = self.grid(z)
        medians = self.integer_medians(z.q)
        symbols, values = to_symbols(z.q, medians, self.unit)
        boundary("entropy_bottleneck", self.name, z.q, symbols, values, means=medians)
        z_hat = self.latent(values, z)
        return z_hat, likelihood(values, lambda: self._likelihood_of(z_hat.real()))


@replaces(TabulatedBottleneck)
class QuantTabulatedBottleneck(QuantEntropyBottleneck):
    """TabulatedBottleneck: z_hat from integers, coded with the module's own tables."""

    module: Any

    def make_tables(self) -> None:
        """There is no density from which tables could be made anew."""

    def _likelihood_of(self, z_hat: Tensor) -> Tensor:
        return self.module.likelihood(z_hat)


@replaces(GaussianConditional, WholeGaussianConditional)
class QuantGaussianConditional(QuantBoundary):
    """GaussianConditional (Balle 2018, Minnen 2018): y_hat and scales from integers, the likelihood of the
    symbols."""

    kind = "gaussian_conditional"
    module: GaussianConditional
    thresholds: Tensor
    inverses: Tensor
    normal: Tensor | None

    def __init__(self, module: GaussianConditional, config: QuantConfig):
        super().__init__(module, config)
        self.rounding = QuantRound(None, config)
        for name in DensityTables._fields:
            self.register_buffer(name, None)

    def bind(self, runtime, name: str) -> None:
        super().bind(runtime, name)
        self.rounding.bind(runtime, f"{name}.quantize")

    def wraps(self, index: int) -> bool:
        return True

    def freeze(self) -> None:
        super().freeze()
        bound = self.module.lower_bound_scale.bound
        assert isinstance(bound, Tensor)
        for name, density in density_tables(self.config.boundary_bits, float(bound))._asdict().items():
            setattr(self, name, density.to(bound.device))

    @property
    def density(self) -> DensityTables:
        """The tables with which a frozen model's symbols are coded."""
        assert self.normal is not None
        return DensityTables(self.thresholds, self.inverses, self.normal)

    def forward(self, inputs, scales, means=None, training=None):
        return super().forward(*([inputs, scales] if means is None else [inputs, scales, means]))

    def quantize(self, inputs, mode: str, means=None):
        """CompressAI's method of this name, which forwards call: "dequantize" is round(inputs - means) +
        means."""
        if mode != "dequantize":
            return self.runtime.in_float(self.module.quantize, (inputs, mode, means), {})
        return self.rounding(inputs) if means is None else self.rounding(inputs, means)

    @property
    def rounds_whole(self) -> bool:
        """y_hat is round(y), not round(y - means) + means."""
        return isinstance(self.module, WholeGaussianConditional) and not self.module.of_residual

    def _likelihood_of(self, symbols: Tensor, scales: Tensor, means: Tensor | None = None) -> Tensor:
        p = self.module._likelihood(symbols, scales, means)
        return self.module.likelihood_lower_bound(p) if self.module.use_likelihood_bound else p

    def real(self, y: Tensor, scales: Tensor, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = means if self.rounds_whole else None
        symbols, y_hat = rounded(y, means if whole is None else None)
        return y_hat, self._likelihood_of(symbols, scales, whole)

    def likelihood_of_coded(
        self, symbols: Tensor, densities: Mapping[str, Tensor], step: Tensor | None = None
    ) -> Tensor:
        means = densities["means"] * self.unit if self.rounds_whole and "means" in densities else None
        return self._likelihood_of(symbols.float(), densities["scales"] * self.unit, means)

    def integer(self, y: QTensor, scales: QTensor, means: QTensor | None = None) -> tuple[QTensor, Tensor]:
        means = None if means is None else self.grid(means)
        mean = None if means is None else means.q
        y, scales = self.grid(y), self.grid(scales)
        symbols, values = to_symbols(y.q, None if self.rounds_whole else mean, self.unit)
        boundary(
            "gaussian",
            self.name,
            y.q,
            symbols,
            values,
            means=mean,
            scales=scales.q,
            whole=self.rounds_whole,
        )

        def estimate() -> Tensor:
            about = to_real(means) if self.rounds_whole else None
            return self._likelihood_of(symbols, to_real(scales), about)

        return self.latent(values, y), likelihood(values, estimate)


@replaces(GaussianMixtureConditional)
class QuantGaussianMixture(QuantGaussianConditional):
    """GaussianMixtureConditional (Cheng 2020): y_hat, scales, means and weights from integers, the likelihood
    of the symbols."""

    kind = "gaussian_mixture"
    module: GaussianMixtureConditional

    def forward(self, inputs, scales, means, weights, training=None):
        return QuantModule.forward(self, inputs, scales, means, weights)

    def _likelihood_of(self, y_hat: Tensor, scales: Tensor, means: Tensor, weights: Tensor) -> Tensor:
        p = self.module._likelihood(y_hat, scales, means, weights)
        return self.module.likelihood_lower_bound(p) if self.module.use_likelihood_bound else p

    def real(self, y: Tensor, scales: Tensor, means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        y_hat = rounded(y, None)[1]
        return y_hat, self._likelihood_of(y_hat, scales, means, weights)

    def likelihood_of_coded(
        self, symbols: Tensor, densities: Mapping[str, Tensor], step: Tensor | None = None
    ) -> Tensor:
        parts = (densities[name] * self.unit for name in ("scales", "means", "weights"))
        return self._likelihood_of(symbols.float(), *parts)

    def integer(
        self, y: QTensor, scales: QTensor, means: QTensor, weights: QTensor
    ) -> tuple[QTensor, Tensor]:
        y, *parts = (self.grid(part) for part in (y, scales, means, weights))
        scales, means, weights = parts
        symbols, values = to_symbols(y.q, None, self.unit)
        boundary(
            "mixture",
            self.name,
            y.q,
            symbols,
            values,
            scales=scales.q,
            means=means.q,
            weights=weights.q,
            whole=True,
        )
        y_hat = self.latent(values, y)
        return y_hat, likelihood(
            values, lambda: self._likelihood_of(y_hat.real(), *(to_real(part) for part in parts))
        )


@replaces(VariableBottleneck)
class QuantVariableBottleneck(QuantEntropyBottleneck):
    """`models.vbr.VariableBottleneck`: z_hat in steps, whose size each image chooses.

    cumulative: `factorized_table`, with which symbols of any step are coded. It is made when the codec is
    frozen.
    """

    module: VariableBottleneck
    cumulative: Tensor | None

    def __init__(self, module: nn.Module, config: QuantConfig):
        super().__init__(module, config)
        self.register_buffer("cumulative", None)

    def make_tables(self) -> None:
        medians = self.module._get_medians().detach().flatten()
        on_grid = round_half_away(medians.double() / self.unit) * self.unit
        self.cumulative = factorized_table(self.module, on_grid).to(medians.device)

    def thaw(self) -> None:
        super().thaw()
        self.cumulative = None

    def forward(self, z, step):
        return QuantModule.forward(self, z, step=step)

    def real(self, z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        medians = self._medians_for(z)
        z_hat = rounded((z - medians) / step, None)[1] * step + medians
        return z_hat, self.module.step_likelihood(z_hat, step)

    def likelihood_of_coded(
        self, symbols: Tensor, densities: Mapping[str, Tensor], step: Tensor | None = None
    ) -> Tensor:
        assert step is not None
        whole = round_half_away(symbols * (step.double() / self.unit))
        medians = round_half_away(self._medians_for(symbols).double() / self.unit)
        return self.module.step_likelihood(((whole + medians) * self.unit).float(), step.float())

    def integer(self, z: QTensor, step: Tensor) -> tuple[QTensor, Tensor]:
        z, step = self.grid(z), step.double()
        medians = self.integer_medians(z.q)
        symbols = rescale(subtract(z.q, medians), self.unit / step)
        values = add(rescale(symbols, step / self.unit), medians)
        boundary("entropy_bottleneck", self.name, z.q, symbols, values, means=medians, step=step)
        z_hat = self.latent(values, z)
        return z_hat, likelihood(values, lambda: self.module.step_likelihood(z_hat.real(), step.float()))
