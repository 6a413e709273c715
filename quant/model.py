"""A quantized codec: the codec's own forward on integers."""

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from licq.quant.bits import SIDES, Bits
from licq.quant.boundaries import QuantEntropyBottleneck
from licq.quant.config import FLOAT_BITS, SIMULATED, QuantConfig, stage_of
from licq.quant.file_checks import wrong_numbers
from licq.quant.fixedpoint import INT32, quantize_multiplier, requantize
from licq.quant.functions import QuantMatMul, QuantWide
from licq.quant.loading import load_quantized
from licq.quant.mac import QuantMAC
from licq.quant.modules import QuantModule
from licq.quant.network_checks import check_network, uncompiled, unwrapped
from licq.quant.outputs import codec_output
from licq.quant.probe import check_probe
from licq.quant.qtensor import QTensor, to_real
from licq.quant.quantizer import Quantizer
from licq.quant.rewriter import NO_LAYER
from licq.quant.rewritten import RewrittenCodec
from licq.quant.runtime import StopForward
from licq.quant.saving import save_quantized
from licq.quant.serialization import refusing
from licq.quant.storage import Origins
from licq.support.cli import explain
from licq.support.determinism import exact_products, plain_torch
from licq.support.errors import InputError, InputWarning
from licq.support.files import sha256

PIXEL = 1 / 255
CLEAR_MISMATCH = 0.05  # of an output's standard deviation
_MAX_QUOTED = 300  # characters of another library's message

_REMARKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Networks whose entropy tables have been remarked on; several models can be made of one."""

_FINAL = "a model from a file is final: its float weights are not in it; quantize the codec again"


def _version(model: nn.Module) -> int:
    """Grows with every change of a weight in place."""
    return sum(tensor._version for tensor in model.parameters() if not tensor.is_inference())


class QuantModel(RewrittenCodec):
    """A codec rewritten for quantization. Its forward maps an image as the codec's does.

    Args:
        model: any module whose forward returns {"x_hat", "likelihoods"}, the likelihoods by name, in a list
            or as one tensor; it is copied, not changed. One in `nn.DataParallel` counts as itself.
        config: see `QuantConfig`.
        bits: of single layers, {layer: {"w_bits": b, "a_bits": b}}. The other layers have the bits of
            `config`. Products of attention have no weights and always have the bits of `config`.

    Raises:
        InputError: `bits` names a layer that the codec does not have, a layer has a forward hook, or a part
            of the model is scripted, traced or quantized already, or is a lazy layer that never ran.
    """

    @plain_torch()
    def __init__(self, model: nn.Module, config: QuantConfig, bits: Bits | None = None):
        model = unwrapped(model)
        super().__init__(model, config, bits)
        self._origin = weakref.ref(model)
        # until the first forward has been compared with the network that was given
        self._source: tuple[weakref.ref[nn.Module], int] | None = (weakref.ref(model), _version(model))

    # ------------------------------------------------------------------------------------------------ running

    @plain_torch()
    def forward(self, x: Tensor) -> dict:
        """x: (B, 3, H, W) in 0..1, 8-bit samples -> {"x_hat", "likelihoods"} as plain tensors, the
        likelihoods by name (see `quant.outputs.codec_output`).

        Autocast and other settings of PyTorch around it change nothing, see `plain_torch`.
        A frozen model gives x_hat as 8-bit samples / 255, rounded and clipped by the integer program.
        A variable-rate codec also takes (B, 5, H, W), where each image has its own gain; see
        `models.qvrf.VariableRate`.
        """
        if x.shape[1] > 3:
            model: Any = self.model
            before, model.rate = model.rate, x[:, 3:4, :1, :1].detach()
            try:
                return self(x[:, :3])
            finally:
                model.rate = before
        runtime = self.runtime
        runtime.begin()
        if runtime.observing:
            image = QTensor(x, None, runtime, pixels=True)
        else:
            scale = torch.as_tensor(PIXEL, dtype=torch.float64, device=x.device)
            image = QTensor(torch.round(x * 255), scale, runtime, pixels=True)
        with exact_products(x.device) if self.frozen else nullcontext():
            output = codec_output(self.model(image))
        x_hat = output["x_hat"]
        if self.frozen and isinstance(x_hat, QTensor) and x_hat.is_integer:
            x_hat = self._pixels(x_hat)
        return {
            **{key: to_real(value) for key, value in output.items()},
            "x_hat": to_real(x_hat),
        }

    def _pixels(self, x_hat: QTensor) -> Tensor:
        """8-bit samples straight from the accumulator, over 255."""
        mantissa, shift = quantize_multiplier(x_hat.full_scale() * 255)
        return (requantize(x_hat.q.double(), mantissa, shift).clamp(0, 255) / 255).float()

    def train(self, mode: bool = True) -> "QuantModel":
        """The codec always runs as in evaluation: rounding, no noise."""
        return super().train(False)

    # -------------------------------------------------------------------------------------------- calibration

    @plain_torch()
    @torch.no_grad()
    def observe(self, batches: Iterable[Tensor], harder: Iterable[Tensor] = ()) -> None:
        """Run the float codec on calibration images and set every static range from what was seen.

        Args:
            batches: images (B, 3, H, W) in 0..1.
            harder: more of them, for ranges from the largest values alone: the mean squares that noise models
                need, and what estimators that clip look at, are those of `batches`.

        Raises:
            InputError: the model comes from a file, its weights are absent or not float32, or licq cannot run
                its forward or runs it wrongly.
        """
        if self.loaded:
            raise InputError(_FINAL)
        check_network(self.model)
        self.quantize_nodes(False)
        runtime = self.runtime
        runtime.observing = True
        first: Tensor | None = None
        try:
            for ranges_only, images in ((False, batches), (True, harder)):
                for batch in images:
                    if first is None:
                        first = batch[:1]
                        self._find_stored(first)
                    for node in runtime.nodes.values():
                        node.calls = 0
                    output = self._run_foreign(batch)
                    if self._source is not None:
                        self._compare_with_source(*self._source, batch, output)
                        self._source = None
                if not ranges_only:
                    for module in self.modules():
                        if isinstance(module, Quantizer):
                            module.ranges_only = True
        finally:
            runtime.observing, runtime.origins = False, None
        if first is None:
            raise InputError("there are no calibration images; give at least one as `images`")
        if not runtime.nodes:
            raise InputError(
                "the model has no layer that can be quantized; see the supported types in quant/rewriter.py"
            )
        for node in self.nodes.values():
            node.initialize()
        self._remove_idle_wide(first)

    def _find_stored(self, batch: Tensor) -> None:
        """Find out what is stored between layers: every forward takes the same path."""
        if self.config.strict_int8:
            self.runtime.origins = Origins()
            self._run_foreign(batch)
            self.runtime.origins = None

    def _run_foreign(self, batch: Tensor) -> dict:
        """The forward, with whatever its code raises on quantized tensors as an error of the user's."""
        try:
            return self(batch)
        except Exception as error:
            if isinstance(error, StopForward) or explain(error) is not None:
                raise
            runtime = self.runtime
            position = f"{runtime.calling} in {runtime.where}" if runtime.calling else runtime.where
            said = " ".join(str(error).split())[:_MAX_QUOTED]
            raise InputError(
                f"licq cannot run this network: {position}: {type(error).__name__}: {said}"
            ) from error

    def _compare_with_source(
        self, reference: weakref.ref[nn.Module], version: int, batch: Tensor, output: dict
    ) -> None:
        """Refuse a network whose float forward here differs from its own.

        The median of the errors decides. A latent that is rounded to the other side changes a part of one
        image; a function that is run wrongly changes everything behind it. The source runs in a copy, and the
        state of the random numbers is restored.
        """
        source: Any = reference()
        if source is None or _version(source) != version:
            return
        try:
            with torch.random.fork_rng([batch.device] if batch.is_cuda else []):
                source = uncompiled(copy.deepcopy(source)).eval().to(batch.device)
                if batch.shape[1] > 3:
                    source.rate = batch[:, 3:4, :1, :1]
                elif hasattr(source, "rate"):  # a variable-rate codec may have been set to another one here
                    source.rate = self.model.rate
                expected = codec_output(source(batch[:, :3].clone()))
                pairs = {"x_hat": (output["x_hat"], expected["x_hat"])}
                pairs |= {
                    f"likelihoods {key}": (output["likelihoods"][key], p)
                    for key, p in expected["likelihoods"].items()
                }
        except Exception:
            return  # it does not run on ordinary tensors: nothing to compare with
        for name, (ours, theirs) in pairs.items():
            error = (ours - theirs).abs().median() if ours.shape == theirs.shape else torch.inf
            if error > CLEAR_MISMATCH * theirs.std(correction=0) + 1e-3:
                raise InputError(
                    f"licq does not run this network as it is: its {name} differs from the network's own by "
                    f"{float(error):.3g} (median); is there a function that licq does not know, "
                    "or one that changes a tensor in place?"
                )

    def _remove_idle_wide(self, batch: Tensor) -> None:
        """Remove the wide activations that no forward on integers needs: there the scale varies or not."""
        self.quantize_nodes(True)
        names = [name for name, node in self.nodes.items() if isinstance(node, QuantWide)]
        with self.runtime.recording([(name, 0) for name in names]) as ran:
            self._run_foreign(batch)
        for name in names:
            if (name, 0) not in ran:
                self.runtime.remove_function(name)

    @plain_torch()
    def freeze(self) -> None:
        """End calibration: integer weights, final scales and tables. The forward is the integer program
        from here on.

        The tables of entropy models are made of their densities, whatever tables a checkpoint held.

        Raises:
            InputError: a density has no tables, or a node has numbers that no program can run on.
        """
        if self.loaded:
            return
        self.quantize_nodes(True)
        for name, node in self.nodes.items():
            if node.stays_float:
                continue
            node.freeze()
            if (problem := wrong_numbers(node)) is not None:
                raise InputError(f"{name}: {problem}; its training or its calibration has diverged")
        self._remark_replaced_tables()
        self.frozen = True

    def _remark_replaced_tables(self) -> None:
        nodes = [node for node in self.nodes.values() if isinstance(node, QuantEntropyBottleneck)]
        names = [node.name for node in nodes if node.replaced]
        for node in nodes:
            node.replaced = False
        origin = self._origin()
        if names and origin not in _REMARKED:
            if origin is not None:
                _REMARKED.add(origin)
            warnings.warn(
                f"the checkpoint's entropy tables of {', '.join(names)} are not those of its densities (it "
                "was trained on, or update() was not called); they are made anew",
                InputWarning,
                stacklevel=3,
            )

    @plain_torch()
    def thaw(self) -> None:
        """Back to a model that can learn.

        Raises:
            InputError: the model comes from a file, which has no float weights.
        """
        if self.loaded:
            raise InputError(_FINAL)
        for node in self.nodes.values():
            node.thaw()
        self.frozen = False
        self.file_sha256 = self.identity = None
        self.checked = {}

    # -------------------------------------------------------------------------------------------------- files

    @plain_torch()
    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> int:
        """Write the frozen model as one safetensors file; returns its size in bytes.

        Args:
            extra: what is wanted back from the file, anything that JSON can hold.

        Raises:
            InputError: the model is not frozen, or the file cannot be written.
        """
        size = save_quantized(self, path, extra)
        self.file_sha256 = sha256(path)
        return size

    @classmethod
    @plain_torch()
    def load(
        cls, path: str | Path, model: nn.Module | None = None, device: torch.device | str | None = None
    ) -> "QuantModel":
        """The frozen model of a file: its forward gives the bits that the saved model gave.

        Args:
            model: a new object of the codec's class, for a codec that is not registered. Its weights do not
                matter.

        Raises:
            InputError: no such file, damaged, not a quantized model, or of another network, also of one that
                computes other pixels.
        """
        loaded = load_quantized(cls, path, model, device)
        loaded.file_sha256 = sha256(path)
        if not type(loaded.model).__module__.startswith(("licq.", "compressai.")):
            with refusing(f"{path} does not run on an image ({{error}}); quantize the codec again"):
                check_probe(loaded, str(path))
        return loaded

    # ------------------------------------------------------------------------------------------------- report

    def coverage(self) -> dict:
        """What is integer and what is not.

        Returns:
            quantized: how many nodes of each kind are integer.
            kept_in_float: functions that have no integer algorithm, and the module that each stands in.
            left_alone: modules that are not integer, with the reason. Layers of 32 bits are among them; those
                with the bits of the whole model have one entry together.
            beyond_int32: layers of a frozen model whose accumulator needs more than 32 bits, with their
            bound.
        """
        kinds: dict[str, int] = {}
        for node in self.nodes.values():
            if not (float_sides(node) or node.stays_float or self.config.is_simulated):
                kinds[node.kind] = kinds.get(node.kind, 0) + 1
        unseen = {name: "never ran in calibration" for name in self.rewrite.nodes if name not in self.nodes}
        # a module without an integer layer is integer where each function of its forward is
        places = {where for _, where in self.runtime.kept_in_float}
        left = {
            name: why
            for name, why in self.rewrite.left_alone.items()
            if not why.endswith(NO_LAYER) or name in places or any(f"{name}." in where for where in places)
        }
        return {
            "quantized": dict(sorted(kinds.items())),
            "kept_in_float": [
                {"function": function, "in": where} for function, where in sorted(self.runtime.kept_in_float)
            ],
            "left_alone": {**left, **unseen, **self._why_real()},
            "beyond_int32": {
                name: float(bound)
                for name, node in self.nodes.items()
                if (bound := getattr(node, "bound", None)) is not None and float(bound) > INT32
            },
        }

    def _why_real(self) -> dict[str, str]:
        """Layers that compute on real numbers, and why. Those with the bits of the whole model have one
        line."""
        stages = dict.fromkeys(stage_of(name) for name, node in self.nodes.items() if node.in_float_stage)
        lines = dict.fromkeys(stages, "stays in float (float_stages)")
        if self.config.is_simulated:
            return {"the codec": SIMULATED} | lines
        common: dict[tuple[str, str], list[str]] = {}
        for name, node in self.nodes.items():
            if (sides := float_sides(node)) and not node.in_float_stage:
                reason = f"products of real numbers ({' and '.join(sides)} 32)"
                if (node.config.w_bits, node.config.a_bits) == (self.config.w_bits, self.config.a_bits):
                    common.setdefault(
                        ("attention products" if node.kind == "matmul" else "layers", reason), []
                    ).append(name)
                else:
                    lines[name] = reason
        for (what, reason), names in common.items():
            lines[names[0] if len(names) == 1 else f"{len(names)} {what}"] = reason
        return lines


def float_sides(node: QuantModule) -> tuple[str, ...]:
    """The sides of a multiply-accumulate node ("w_bits", "a_bits") that have 32 bits. Where there is one, the
    products are of real numbers."""
    sides = ("a_bits",) if isinstance(node, QuantMatMul) else SIDES if isinstance(node, QuantMAC) else ()
    return tuple(side for side in sides if getattr(node.config, side) == FLOAT_BITS)
