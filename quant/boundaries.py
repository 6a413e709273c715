"""The codec's boundaries on integers: rounding of y and z, entropy bottleneck, Gaussian conditional.

y, z, means and scales come straight from their accumulators onto a grid of 2^-f (design, section 3). The
likelihoods
are estimates in float, for the rate: no symbol and no pixel depends on them.
"""

from typing import Any

import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor, nn

from licq.models.layers import WholeGaussianConditional
from licq.models.vbr import OffsetNet
from licq.quant.config import QuantConfig
from licq.quant.density import DensityTables, density_tables, factorized_table
from licq.quant.fixedpoint import requantize_ste, round_half_away, round_ste
from licq.quant.grid import Grid
from licq.quant.modules import QuantModule
from licq.quant.qtensor import QTensor, to_real

_WIDE = 24  # bits of the boundary grids; the numbers stay exact in float32


def boundary_grid(config: QuantConfig) -> Grid:
    """The fixed grid of 2^-f that boundary tensors are put on."""
    return Grid(_WIDE, config.frac_bits, fixed=2.0**-config.boundary_bits)


def symbols_and_values(x: QTensor, means: QTensor | None, unit: float) -> tuple[Tensor, QTensor]:
    """(round(x - means) as whole numbers, that plus means on the boundary grid); straight-through
    gradients."""
    residual = x.q if means is None else x.q - means.q
    symbols = requantize_ste(residual, torch.as_tensor(unit, dtype=torch.float64, device=x.q.device))
    values = symbols / unit
    return symbols, QTensor(values if means is None else values + means.q, x.scale, x.runtime, latent=True)


def rounded(x: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """(round(x - means), that plus means) on real numbers, with straight-through gradients."""
    residual = x if means is None else x - means
    symbols = residual + (torch.round(residual) - residual).detach()
    return symbols, symbols if means is None else symbols + means


class QuantBoundary(QuantModule):
    """A place where a latent is rounded; its inputs come onto the grid of the boundaries, whose step is
    `unit`."""

    gives_latents = True

    def __init__(self, module: nn.Module | None, config: QuantConfig):
        super().__init__(config)
        self.module = module
        self.unit = 2.0**-config.boundary_bits
        self.grid = boundary_grid(config)


class QuantRound(QuantBoundary):
    """round(x - means) + means: the values that the decoder will have."""

    kind = "round"

    def real(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        return rounded(x, means)[1]

    def integer(self, x: QTensor, means: QTensor | Tensor | None = None) -> QTensor:
        if isinstance(means, Tensor):
            means = QTensor(means, None, self.runtime)
        return symbols_and_values(self.grid(x), None if means is None else self.grid(means), self.unit)[1]


class QuantEntropyBottleneck(QuantBoundary):
    """EntropyBottleneck (Balle 2018): z_hat from integers, its likelihood under the learned factorized
    density."""

    kind = "entropy_bottleneck"

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

    def integer(self, z: QTensor) -> tuple[QTensor, Tensor]:
        z = self.grid(z)
        medians = z.like(round_ste(self._medians_for(z.q) / self.unit), z.scale)
        z_hat = symbols_and_values(z, medians, self.unit)[1]
        return z_hat, self._likelihood_of(z_hat.real())


class QuantGaussianConditional(QuantBoundary):
    """GaussianConditional (Balle 2018, Minnen 2018): y_hat and scales from integers, the likelihood of the
    symbols."""

    kind = "gaussian_conditional"

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
        smallest = float(self.module.lower_bound_scale.bound)
        for name, table in density_tables(self.config.boundary_bits, smallest)._asdict().items():
            setattr(self, name, table.to(self.module.lower_bound_scale.bound.device))

    @property
    def density(self) -> DensityTables:
        """What a frozen model's symbols are coded with."""
        return DensityTables(self.thresholds, self.inverses, self.normal)

    def forward(self, inputs, scales, means=None, training=None):
        return super().forward(*([inputs, scales] if means is None else [inputs, scales, means]))

    def quantize(self, inputs, mode: str, means=None):
        """What the codec's forward calls by name: "dequantize" is round(inputs - means) + means."""
        if mode != "dequantize":
            return self.runtime.in_float(self.module.quantize, (inputs, mode, means), {})
        return self.rounding(inputs) if means is None else self.rounding(inputs, means)

    @property
    def rounds_whole(self) -> bool:
        """y_hat is round(y), though there are means."""
        return isinstance(self.module, WholeGaussianConditional) and not self.module.of_residual

    def _likelihood_of(self, symbols: Tensor, scales: Tensor, means: Tensor | None = None) -> Tensor:
        likelihood = self.module._likelihood(symbols, scales, means)
        return (
            self.module.likelihood_lower_bound(likelihood) if self.module.use_likelihood_bound else likelihood
        )

    def real(self, y: Tensor, scales: Tensor, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = means if self.rounds_whole else None
        symbols, y_hat = rounded(y, means if whole is None else None)
        return y_hat, self._likelihood_of(symbols, scales, whole)

    def integer(self, y: QTensor, scales: QTensor, means: QTensor | None = None) -> tuple[QTensor, Tensor]:
        means = None if means is None else self.grid(means)
        whole = means if self.rounds_whole else None
        symbols, y_hat = symbols_and_values(self.grid(y), means if whole is None else None, self.unit)
        return y_hat, self._likelihood_of(
            symbols, to_real(self.grid(scales)), None if whole is None else to_real(whole)
        )


class QuantGaussianMixture(QuantGaussianConditional):
    """GaussianMixtureConditional (Cheng 2020): y_hat, scales, means and weights from integers, the likelihood
    of the symbols."""

    kind = "gaussian_mixture"

    def forward(self, inputs, scales, means, weights, training=None):
        return QuantModule.forward(self, inputs, scales, means, weights)

    def _likelihood_of(self, y_hat: Tensor, scales: Tensor, means: Tensor, weights: Tensor) -> Tensor:
        likelihood = self.module._likelihood(y_hat, scales, means, weights)
        return (
            self.module.likelihood_lower_bound(likelihood) if self.module.use_likelihood_bound else likelihood
        )

    def real(self, y: Tensor, scales: Tensor, means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        y_hat = rounded(y, None)[1]
        return y_hat, self._likelihood_of(y_hat, scales, means, weights)

    def integer(
        self, y: QTensor, scales: QTensor, means: QTensor, weights: QTensor
    ) -> tuple[QTensor, Tensor]:
        y_hat = symbols_and_values(self.grid(y), None, self.unit)[1]
        return y_hat, self._likelihood_of(
            y_hat.real(), *(to_real(self.grid(part)) for part in (scales, means, weights))
        )


class QuantOffsets(QuantBoundary):
    """`models.vbr.OffsetNet`: y_hat with offsets from a table over the scale, one for each gain.

    A table is made when its gain is first met, with the same bits on every machine; so it need not be in the
    model's file.
    """

    kind = "offsets"

    def __init__(self, module: OffsetNet, config: QuantConfig):
        super().__init__(module, config)
        self.scale_grid = Grid(config.table_bits, config.frac_bits, headroom=1.25, symmetry="one_sided")
        self._tables: dict[float, Tensor] = {}

    def wraps(self, index: int) -> bool:
        return index != 2

    def forward(self, y, scales, means, gain):
        return super().forward(y, scales, gain, means)

    def real(self, y: Tensor, scales: Tensor, gain: Tensor, means: Tensor | None) -> Tensor:
        return self.module(y, scales, means, gain)

    def observe(self, inputs: tuple, output: Any) -> None:
        _, scales, gain, _ = inputs
        self.scale_grid.observe(scales.real() * gain)

    def table(self, gain: float) -> Tensor:
        """The offset of every whole number of the scale's grid, in units of the boundary."""
        if gain not in self._tables:
            step, low, high = self.scale_grid.parameters_of_grid()
            scales = torch.arange(int(low), int(high) + 1, device=step.device) * step.detach()
            self._tables[gain] = round_half_away(
                self.module.table(scales, gain).to(step.device) / self.unit
            ).float()
        return self._tables[gain]

    @torch.no_grad()
    def offsets(self, symbols: Tensor, scales: QTensor, gain: Tensor) -> Tensor:
        """What the symbols are moved by, on the boundary grid; nothing where they are 0. gain: float64."""
        index = self.scale_grid(scales * gain)
        places = (index.q - self.scale_grid.parameters_of_grid()[1]).long()
        tables = [self.table(float(value)) for value in gain.flatten()]
        offsets = (
            torch.cat([table[part] for table, part in zip(tables, places.split(1))])
            if len(tables) > 1
            else tables[0][places]
        )
        return torch.where(symbols == 0, 0.0, offsets) * symbols.sign()

    def integer(self, y: QTensor, scales: QTensor, gain: Tensor, means: QTensor | None) -> QTensor:
        y, mean = self.grid(y), 0.0 if means is None else self.grid(means).q
        gain = gain.double()
        symbols = requantize_ste(y.q - mean, gain * self.unit)
        values = requantize_ste(symbols / self.unit + self.offsets(symbols, scales, gain), 1 / gain)
        return QTensor(values + mean, y.scale, y.runtime, latent=True)

    def freeze(self) -> None:
        super().freeze()
        self._tables = {}

    def thaw(self) -> None:
        super().thaw()
        self._tables = {}


class QuantWholeOffsets(QuantOffsets):
    """`models.vbr.WholeOffsetNet`: the same from symbols that are known already; shares in 2^-12."""

    kind = "whole_offsets"
    share_bits = 12

    def shares(self) -> Tensor:
        """Of every whole number of the scale's grid."""
        step, low, high = self.scale_grid.parameters_of_grid()
        scales = torch.arange(int(low), int(high) + 1, device=step.device) * step.detach().double()
        return round_half_away(self.module.shares(scales) * 2**self.share_bits).float()

    def integer(self, symbols: QTensor, scales: QTensor, gain: Tensor, means: QTensor) -> QTensor:
        symbols, mean, gain = self.grid(symbols), self.grid(means).q, gain.double()
        residual = symbols.q - requantize_ste(mean, gain)
        nearest = requantize_ste(
            residual, torch.as_tensor(self.unit, dtype=torch.float64, device=residual.device)
        )
        with torch.no_grad():
            places = (self.scale_grid(scales * gain).q - self.scale_grid.parameters_of_grid()[1]).long()
            shares = torch.where(nearest == 0, self.shares()[places], 0.0)
        near = requantize_ste(
            torch.where(nearest == 0, residual, 0.0) * shares,
            torch.as_tensor(2.0**-self.share_bits, dtype=torch.float64, device=residual.device),
        )
        moved = torch.where(nearest == 0, near, residual + self.offsets(nearest, scales, gain))
        return QTensor(requantize_ste(moved, 1 / gain) + mean, symbols.scale, symbols.runtime, latent=True)


class QuantVariableBottleneck(QuantEntropyBottleneck):
    """`models.vbr.VariableBottleneck`: z_hat in steps of each image's own size.

    cumulative: `factorized_table`, with which symbols of any step are coded; made when the codec is frozen.
    """

    def __init__(self, module: nn.Module, config: QuantConfig):
        super().__init__(module, config)
        self.register_buffer("cumulative", None)

    def freeze(self) -> None:
        super().freeze()
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

    def integer(self, z: QTensor, step: Tensor) -> tuple[QTensor, Tensor]:
        z, step = self.grid(z), step.double()
        medians = round_ste(self._medians_for(z.q) / self.unit)
        symbols = requantize_ste(z.q - medians, self.unit / step)
        z_hat = QTensor(requantize_ste(symbols, step / self.unit) + medians, z.scale, z.runtime, latent=True)
        return z_hat, self.module.step_likelihood(z_hat.real(), step.float())
