"""The base class of quantized layers and functions, and how a kind of layer names what it replaces."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from licq.quant.config import QuantConfig
from licq.quant.grid import Grid
from licq.quant.qtensor import QTensor
from licq.quant.runtime import Runtime
from licq.support.errors import InputError

Make = TypeVar("Make", bound="Callable[..., QuantModule]")

REPLACEMENTS: dict[type[nn.Module], "Callable[[nn.Module, QuantConfig], QuantModule]"] = {}
"""What the rewriter puts in the place of a module, by the module's type."""


def replaces(*layers: type[nn.Module]) -> Callable[[Make], Make]:
    """A decorator: the rewriter puts `make(module, config)` wherever a module of these types stands.

    make: a subclass of `QuantModule`, or a function that gives one.
    """

    def register(make: Make) -> Make:
        REPLACEMENTS.update(dict.fromkeys(layers, make))
        return make

    return register


class QuantModule(nn.Module):
    """A node of a quantized codec: a layer or a function, in one of three states.

    Float (`quantized` is False): the original computation on real values. Observing: the same, and the grids
    watch.
    Quantized: `integer` on whole numbers. Subclasses implement `real`, `observe` and `integer`.
    """

    kind = ""
    gives_latents = False  # its (first) output is y_hat or z_hat
    gives_levels = False  # its output is on levels that are no multiples of a step

    def __init__(self, config: QuantConfig):
        super().__init__()
        self.config = config
        self.quantized = False
        self.name = ""
        self.runtime: Runtime | None = None
        self.calls = 0  # in one forward of the codec

    def bind(self, runtime: Runtime, name: str) -> None:
        # not through nn.Module's __setattr__: the runtime holds modules and must not become a submodule
        object.__setattr__(self, "runtime", runtime)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        # the codec's forward may ask the layer that stood here for its attributes
        try:
            return super().__getattr__(name)
        except AttributeError:
            wrapped = self.__dict__.get("_modules", {}).get("module")
            if wrapped is None:
                raise
            return getattr(wrapped, name)

    def forward(self, *inputs, **kwargs):
        return self.runtime.execute(self, inputs, lambda: self._run(inputs, kwargs))

    def _run(self, inputs: tuple, kwargs: dict):
        runtime = self.runtime
        inputs = tuple(
            QTensor(x, None, runtime) if isinstance(x, Tensor) and self.wraps(i) else x
            for i, x in enumerate(inputs)
        )
        if runtime.tracer is not None:
            runtime.tracer.node = self.name
            if not self.quantized:
                raise InputError(
                    f"{self.name} is kept in float, so the model cannot be lowered; quantize it with all nodes"
                )
        if self.quantized:
            return self.integer(*inputs, **kwargs)
        output = self.real(*(x.real() if isinstance(x, QTensor) else x for x in inputs), **kwargs)
        if runtime.observing:
            runtime.nodes.setdefault(self.name, self)
            self.calls += 1
            self.observe(inputs, output)
        output = runtime.wrap(output)
        if self.gives_latents:
            (output[0] if isinstance(output, tuple) else output).latent = True
        elif self.gives_levels:
            output.levels = True
        return output

    def wraps(self, index: int) -> bool:
        """Whether a plain tensor as input number `index` is data (True) or a constant (False)."""
        return index == 0

    def real(self, *inputs: Tensor, **kwargs) -> Any:
        """The original computation."""
        raise NotImplementedError

    def observe(self, inputs: tuple, output: Any) -> None:
        """Let the grids watch one forward."""

    def integer(self, *inputs: QTensor, **kwargs) -> Any:
        """The same on whole numbers."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Static ranges from what was observed."""
        for grid in self.grids():
            grid.initialize()

    def grids(self) -> list[Grid]:
        return [module for module in self.children() if isinstance(module, Grid)]

    def freeze(self) -> None:
        """Make everything final: `integer` then uses stored whole numbers and stored scales only."""
        for grid in self.grids():
            grid.freeze()

    def thaw(self) -> None:
        for grid in self.grids():
            grid.thaw()

    def learnable(self) -> dict[str, list[nn.Parameter]]:
        """What reconstruction may learn here, by knob: range_w, range_b, range_a, rounding, border, bias."""
        return {}
