"""A codec whose layers are nodes: its parts, without a forward.

`quant.model.QuantModel` runs it. The writer and the reader of files need its parts alone.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from licq.quant.bits import Bits, check_layers
from licq.quant.config import FLOAT_BITS, QuantConfig
from licq.quant.functions import make_function
from licq.quant.mac import QuantMAC
from licq.quant.modules import QuantModule
from licq.quant.network_checks import check_code, unwrapped
from licq.quant.rewriter import Rewrite, fixed_weights, rewrite
from licq.quant.runtime import Runtime
from licq.support.errors import InputError


class RewrittenCodec(nn.Module):
    """A copy of a codec with nodes in the place of its layers.

    Args:
        model: any module whose forward returns {"x_hat", "likelihoods"}; it is copied, not changed. One in
            `nn.DataParallel` counts as itself.
        config: see `QuantConfig`.
        bits: of single layers, {layer: {"w_bits": b, "a_bits": b}}. The other layers have the bits of
            `config`. Products of attention have no weights and always have the bits of `config`. Layers of
            `QuantConfig.float_stages` have 32 bits whatever is said here.

    Attributes:
        model: the copy, on which the codec's own forward runs.
        rewrite: what the rewriter replaced, and what it left alone.
        functions: the nodes of functions (`a + b`, softmax ...), by name with "/" for ".".
        runtime: the state of the forward passes.
        frozen: the weights, scales and tables are final.
        loaded: the model comes from a file. It has integers only, so nothing can be learned from it.
        extra: what the writer of the file wanted to find again; JSON.
        checked: what was checked of the frozen model, JSON: "repeatable" by `reconstruction.repeatability`,
            "files" by `codec.api`.
        history: what calibration did, step by step; `reconstruction` writes it.
        file_sha256: of the file that the model was last saved to or loaded from.
        identity: of the frozen program, once it is known; see `quant.identity`.

    Raises:
        InputError: `bits` names a layer that the codec does not have, a layer has a forward hook, or a part
            of the model is scripted, traced or quantized already, or is a lazy layer that never ran; all
            layers lie in `QuantConfig.float_stages`.
    """

    config: QuantConfig
    model: nn.Module
    rewrite: Rewrite
    functions: nn.ModuleDict
    runtime: Runtime
    frozen: bool
    loaded: bool
    extra: dict[str, Any]
    history: dict[str, Any]
    checked: dict[str, Any]
    file_sha256: str | None
    identity: str | None

    def __init__(self, model: nn.Module, config: QuantConfig, bits: Bits | None = None):
        super().__init__()
        check_code(model)
        self.config = config
        runtime = Runtime(config, make_function)
        # not through nn.Module's __setattr__: the runtime holds modules and must not become a submodule
        object.__setattr__(self, "runtime", runtime)
        self.model = fixed_weights(unwrapped(model))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.rewrite = rewrite(self.model, config, runtime)
        self.functions = runtime.functions
        check_layers(bits or {}, self.layers)
        for name, sides in (bits or {}).items():
            self.layers[name].set_bits(**sides)
        self._leave_stages_in_float()
        self.frozen = self.loaded = False
        self.extra, self.history, self.checked = {}, {}, {}
        self.file_sha256 = self.identity = None

    def _leave_stages_in_float(self) -> None:
        """Give the layers of `QuantConfig.float_stages` 32 bits.

        Raises:
            InputError: no layer is left.
        """
        stages = self.config.float_stages
        inside = [layer for layer in self.layers.values() if layer.in_float_stage]
        if inside and len(inside) == len(self.layers):
            raise InputError(
                f"all layers of this codec lie in {', '.join(stages)}, which `float_stages` keeps in float, "
                "so nothing is quantized; choose other `float_stages`, or another preset"
            )
        for layer in inside:
            layer.set_bits(FLOAT_BITS, FLOAT_BITS)

    @property
    def nodes(self) -> dict[str, QuantModule]:
        """Every node that has run, by name, in the order of first execution."""
        return self.runtime.nodes

    @property
    def layers(self) -> dict[str, QuantMAC]:
        """The multiply-accumulate layers by name, whether they have run or not. Each can have bits of its
        own."""
        return {name: node for name, node in self.rewrite.nodes.items() if isinstance(node, QuantMAC)}

    def quantize_nodes(self, quantized: bool, names: Iterable[str] | None = None) -> None:
        """Switch nodes between quantized and float. names: which; None: all."""
        nodes = (
            [*self.rewrite.nodes.values(), *self.runtime.functions.values()]
            if names is None
            else [self.nodes[name] for name in names]
        )
        for node in nodes:
            for part in node.modules():
                if isinstance(part, QuantModule):
                    part.quantized = quantized
