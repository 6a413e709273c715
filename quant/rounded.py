"""The node of torch.round, by which a forward rounds a latent itself, as CompressAI's context models do."""

from typing import Any

from torch import Tensor

from licq.quant.boundaries import boundary_quantizer
from licq.quant.config import QuantConfig
from licq.quant.fixedpoint import round_ste
from licq.quant.functions import QuantFunction
from licq.quant.latents import rounded, to_symbols
from licq.quant.primitives import boundary, constant
from licq.quant.qtensor import QTensor


class QuantRounding(QuantFunction):
    """(round(x - means), round(x - means) + means) of a latent x."""

    kind = "round"
    gives_latents = True

    def __init__(self, config: QuantConfig, **options: Any):
        super().__init__(config, **options)
        self.unit = 2.0**-config.boundary_bits
        self.grid = boundary_quantizer(config)

    def real(self, x: Tensor, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rounded(x, means)

    def integer(self, x: QTensor, means: QTensor | Tensor | None = None) -> tuple[QTensor, QTensor]:
        x = self.grid(x)
        mean = None
        if isinstance(means, QTensor):
            mean = self.grid(means).q
        elif means is not None:
            mean = constant(round_ste(means.detach() / self.unit), self.runtime.tracer)
        symbols, values = to_symbols(x.q, mean, self.unit)
        boundary("round", self.name, x.q, symbols, values, means=mean)
        whole = QTensor(symbols, x.unit / self.unit, self.runtime, latent=True)
        return whole, QTensor(values, x.scale, self.runtime, latent=True)
