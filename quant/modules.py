"""The base class of quantized layers and functions, and how a kind of layer names what it replaces."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from licq.quant.config import QuantConfig, stage_of
from licq.quant.qtensor import QTensor
from licq.quant.quantizer import Quantizer
from licq.quant.runtime import Runtime
from licq.support.errors import InputError

Make = TypeVar("Make", bound="Callable[..., QuantModule]")

REPLACEMENTS: dict[type[nn.Module], "Callable[[nn.Module, QuantConfig], QuantModule]"] = {}
"""By the type of a module: what makes the node that the rewriter puts in its place."""


def replaces(*layers: type[nn.Module]) -> Callable[[Make], Make]:
    """A decorator: the rewriter puts `make(module, config)` wherever a module of these types stands.

    make: a subclass of `QuantModule`, or a function that gives one.
    """

    def register(make: Make) -> Make:
        REPLACEMENTS.update(dict.fromkeys(layers, make))
        return make

    return register


def attribute_of_wrapped(node: nn.Module, name: str) -> Any:
    """The attribute of the module that stood where this node or block stands; AttributeError: it has none."""
    wrapped = node.__dict__.get("_modules", {}).get("module")
    if wrapped is None:
        raise AttributeError(f"{type(node).__name__!r} object has no attribute {name!r}")
    return getattr(wrapped, name)


class QuantModule(nn.Module):
    """A node of a quantized codec: a layer or a function. Subclasses implement `real`, `observe`, `integer`.

    A node is in one of three states:

    - float (`quantized` is False): `real`, the original computation on real values.
    - observing: `real`, and `observe` shows the values to the quantizers.
    - quantized: `integer`, the same computation on integers.
    """

    kind: str = ""
    """What reports and files call this kind of node."""

    gives_latents: bool = False
    """The (first) output is y_hat or z_hat."""

    sums: bool = False
    """The node multiplies and accumulates."""

    channel_dim: int | None = None
    """Of the channels of what the node sums; None where that is not known."""

    simulates: bool = False
    """With simulated scales (`QuantConfig.a_scales`) the node rounds what it computes with."""

    runtime: Runtime
    """Of the codec that the node belongs to; set by `bind`."""

    def __init__(self, config: QuantConfig):
        super().__init__()
        self.config = config
        self.quantized = False
        self.name = ""
        self.calls = 0  # in one forward of the codec

    @property
    def gives_levels(self) -> bool:
        """The output is on levels that are no multiples of a step."""
        return False

    @property
    def stays_float(self) -> bool:
        """The node computes in float also where the codec is quantized: its scales are simulated, or its
        stage stays in float."""
        return self.config.is_simulated and not self.simulates or self.in_float_stage

    @property
    def in_float_stage(self) -> bool:
        """Whether the node lies in one of `QuantConfig.float_stages`."""
        return stage_of(self.name) in self.config.float_stages

    def bind(self, runtime: Runtime, name: str) -> None:
        """Make this the node `name` of a codec."""
        # not through nn.Module's __setattr__: the runtime holds modules and must not become a submodule
        object.__setattr__(self, "runtime", runtime)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        # the codec's forward may ask the layer that stood here for its attributes
        try:
            return super().__getattr__(name)
        except AttributeError:
            return attribute_of_wrapped(self, name)

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
                    f"{self.name} is kept in float, so the model cannot be lowered; "
                    "quantize it with all nodes"
                )
        if self.quantized and not self.stays_float:
            return self.integer(*inputs, **kwargs)
        output = self.real(*(x.real() if isinstance(x, QTensor) else x for x in inputs), **kwargs)
        if runtime.observing:
            runtime.nodes.setdefault(self.name, self)
            self.calls += 1
            if runtime.origins is None:
                self.observe(inputs, output)
            else:
                self.find_stored(inputs)
        output = runtime.wrap(output)
        if runtime.origins is not None:
            runtime.origins.of_node(inputs, output, self.sums, self.channel_dim)
        if self.gives_latents:
            latent = output[0] if isinstance(output, tuple) else output
            latent.latent = True
        elif self.gives_levels:
            output.levels = True
        return output

    def wraps(self, index: int) -> bool:
        """Whether a plain tensor as input number `index` is data (True) or a constant (False)."""
        return index == 0

    def real(self, *inputs: Tensor, **kwargs) -> Any:
        """The original computation."""
        raise NotImplementedError

    def find_stored(self, inputs: tuple) -> None:
        """Under `strict_int8`, before anything is observed: see which inputs are stored (`quant.storage`)."""

    def observe(self, inputs: tuple, output: Any) -> None:
        """Show the values of one forward to the quantizers. output: of `real`."""

    def integer(self, *inputs: QTensor, **kwargs) -> Any:
        """The computation of `real` on integers."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Set static ranges from what was observed."""
        for quantizer in self.quantizers():
            quantizer.initialize()

    def quantizers(self) -> list[Quantizer]:
        """The quantizers that are attributes of this node."""
        return [module for module in self.children() if isinstance(module, Quantizer)]

    def freeze(self) -> None:
        """Make everything final: from here on `integer` uses stored integers and stored scales only."""
        for quantizer in self.quantizers():
            quantizer.freeze()

    def thaw(self) -> None:
        """Undo `freeze`."""
        for quantizer in self.quantizers():
            quantizer.thaw()

    def learnable(self) -> dict[str, list[nn.Parameter]]:
        """What reconstruction may learn here, by the names of `ReconstructionConfig.learn`."""
        return {}
