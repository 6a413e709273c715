"""`licq.Codec`: images to .licq files and back, with a quantized model."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from licq.codec.checks import check_content, check_size, image_of
from licq.codec.container import GAIN_UNIT, MAX_GAIN, MODEL_BYTES, TILE, Container
from licq.codec.measured import MeasuredImage, check_decoded, estimated_bits
from licq.codec.model_tables import coder_of
from licq.codec.plan import Plan
from licq.codec.ready_plan import ReadyPlan
from licq.codec.sizes import Sizes
from licq.data.padding import crop_back, pad_to_multiple
from licq.integer.execution import executable
from licq.integer.lowering import lower
from licq.integer.program import Program
from licq.models.registry import architecture_of, get_architecture
from licq.quant.model import QuantModel
from licq.quant.saving import model_identity
from licq.support.determinism import plain_torch
from licq.support.errors import InputError

_PLANS = 2  # sizes whose programs are kept
_CHECKED_SIDE = 128  # pixels of the part of an image that a model is checked on


class Codec:
    """Writes images to .licq files and reads them, with integer arithmetic alone.

    A file decodes to the same pixels on every machine, and these are the pixels of the quantized model's own
    forward.

        codec = licq.Codec(qmodel)                     # or licq.Codec.load("m.safetensors")
        data = codec.encode(pixels)                    # uint8 (3, H, W) -> bytes
        pixels = codec.decode(data)                    # bytes -> uint8 (3, H, W)

    Grey images are uint8 (1, H, W), there and back. They are coded as three equal channels.

    A file names the model that decodes it by the first bytes of the model's identity, a hash of the program
    and its tables (`quant.identity`). It is the same before the model is saved and after it is loaded, and
    for a calibration that is repeated or resumed with the same result. Files of earlier versions name the
    SHA-256 of the model's file; a model that was saved or loaded decodes those of its file, too.

    Args:
        model: a frozen model, as `licq.quantize` returns it.
        digest: what files name the model by, 4 bytes or more; None: its identity.
        threads: CPU threads; None: PyTorch's choice. The result does not depend on them.
        multiple: images are padded to sides that are multiples of it; None: that of the model's
            architecture, 64 where it has none.
        tile: images of more than tile x tile pixels are computed in tiles, which takes less memory and does
            not change the result; None: never.
        progress: show on standard error how many tiles of a large image are done.

    Raises:
        InputError: the model is not frozen.
    """

    @plain_torch()
    def __init__(
        self,
        model: QuantModel,
        digest: bytes | None = None,
        threads: int | None = None,
        multiple: int | None = None,
        tile: int | None = TILE,
        progress: bool = False,
    ):
        if not model.frozen:
            raise InputError("only a frozen model can write files; call freeze() after calibration")
        if (why := model.config.why_no_files) is not None:
            raise InputError(f"{why}, so the model has no files")
        known = architecture_of(model.model)
        self.multiple = multiple or (get_architecture(known[0]).multiple if known else 64)
        self.model, self.threads = model, threads
        self.digest = (bytes.fromhex(model_identity(model)) if digest is None else digest)[:MODEL_BYTES]
        self.variable = hasattr(model.model, "set_level")
        self._network: Any = model.model
        self._coder = coder_of(model)
        self._plans: OrderedDict[tuple[int, int, int], Plan] = OrderedDict()
        self.sizes = Sizes(self._lowered, self.multiple, tile, progress)

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None, **options: Any) -> "Codec":
        """The codec of a model's file, which `QuantModel.save` or main_ptq.py has written.

        Args:
            threads: CPU threads; None: PyTorch's choice.
            options: `multiple`, `tile` and `progress` of `Codec`.

        Raises:
            InputError: no such file, a damaged one, or none of a quantized model.
        """
        return cls(QuantModel.load(path), None, threads, **options)

    @plain_torch()
    def encode(self, pixels: Tensor, level: float | None = None) -> bytes:
        """Encode an image.

        Args:
            pixels: uint8 (3, H, W), or (1, H, W) of a grey image, of any size up to 2^26 pixels.
            level: the rate of a variable-rate codec, from 1 (smallest files) to the number of its levels,
                whole or not; None: the rate that the model is set to.

        Returns:
            The content of a .licq file.

        The first image of a model that no file says to be checked is also a check of the model, see `check`.

        Raises:
            InputError: pixels of another type or shape, or too many; a level that the codec does not have; a
                codec whose forward has no bitstream, or whose files decode to other pixels than its own.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) not in (1, 3) or not pixels.numel():
            raise InputError(
                f"an image of type {pixels.dtype} and shape {tuple(pixels.shape)} cannot be encoded; give "
                "uint8 (3, H, W), or (1, H, W) of a grey image, as `pixels`"
            )
        self.check_once(pixels, level)
        return self._encoded(pixels, level)

    def check_once(self, pixels: Tensor | np.ndarray, level: float | None = None) -> None:
        """`check`, unless this model has been checked or its file says so."""
        if "files" not in self.model.checked:
            self.check(torch.from_numpy(np.array(pixels)), level)

    def _encoded(self, pixels: Tensor, level: float | None) -> bytes:
        gain = self.gain(level)
        height, width = pixels.shape[-2:]
        check_size(height, width, self.multiple)
        grey = len(pixels) == 1
        padded, _ = pad_to_multiple(pixels.expand(3, -1, -1)[None], self.multiple)
        plan = self._plan(padded.shape[-2], padded.shape[-1], gain)
        stream = self._coder.encode(plan, padded.contiguous().numpy())
        return Container(self.digest, width, height, gain, (stream,), grey).to_bytes()

    @plain_torch()
    def measure(self, pixels: Tensor) -> MeasuredImage:
        """Encode an image, decode the file, and estimate its rate, by the integer program alone.

        The decoder's symbols, densities and y_hat are compared with the encoder's; the pixels follow from
        them. The first image of a model is also compared with the model's own forward, see `check`.

        Args:
            pixels: uint8 (3, H, W).

        Raises:
            InputError: as `encode`; or the decoder has other numbers than the encoder.
        """
        self.check_once(pixels)
        gain = self.gain(None)
        height, width = pixels.shape[-2:]
        check_size(height, width, self.multiple)
        padded, _ = pad_to_multiple(pixels[None], self.multiple)
        plan = self._plan(padded.shape[-2], padded.shape[-1], gain)
        values = plan.encode(padded.contiguous().numpy())
        stream = self._coder.encode_symbols(plan, values)
        data = Container(self.digest, width, height, gain, (stream,)).to_bytes()
        content, found = Container.from_bytes(data), []
        decoded = self._coder.decode(plan, content.streams[0], found)
        check_decoded(plan.latents, values, found, self._coder.bits)
        image = torch.from_numpy(image_of(content, decoded, self.multiple))
        return MeasuredImage(data, image, estimated_bits(self.model, plan.latents, values))

    @plain_torch()
    def decode(self, data: bytes) -> Tensor:
        """Decode an image.

        Args:
            data: the content of a .licq file that was encoded with this model.

        Returns:
            uint8 (3, H, W), on the CPU; (1, H, W) of an image that was encoded as such: the mean of the three
            decoded channels, (R + G + B + 1) // 3.

        Raises:
            InputError: the file is damaged, or of another model.
        """
        content = Container.from_bytes(data)
        height, width = check_content(content, self._names(), self.variable, self.multiple)
        plan = self._plan(height, width, content.gain)
        decoded = self._coder.decode(plan, content.streams[0])
        return torch.from_numpy(image_of(content, decoded, self.multiple))

    def ready_plan(self, what: str, height: int, width: int, gain: int) -> ReadyPlan:
        """What one direction of coding needs, for images of height x width with their padding.

        Args:
            what: "encode" or "decode".
            gain: see `gain`.
        """
        plan = self._plan(height, width, gain)
        orders = [plan.order(index) for index in range(len(plan.latents))]
        if what == "encode":
            return ReadyPlan(self._coder, plan.latents, orders, plan.encoder)
        return ReadyPlan(self._coder, plan.latents, orders, None, plan.steps, plan.synthesis)

    @plain_torch()
    def check(self, pixels: Tensor, level: float | None = None) -> dict[str, Any]:
        """Check that a file decodes to the pixels of the quantized network's own forward.

        The file is of the image's first 128 x 128 pixels. A second codec, which shares no program with this
        one, decodes it. The result is kept as `checked["files"]` of the model, and in its file.

        Args:
            pixels: uint8 (3, H, W), or (1, H, W).
            level: of a variable-rate codec, as in `encode`.

        Returns:
            {"height", "width", "bytes"} of what was encoded; {"none": why} for a codec without bitstream.

        Raises:
            InputError: the pixels differ: the forward depends on something else than the image.
        """
        model = self.model
        self.gain(level)
        piece = pixels[:, :_CHECKED_SIDE, :_CHECKED_SIDE].expand(3, -1, -1).contiguous()
        try:
            data = self._encoded(piece, level)
        except InputError as error:
            model.checked["files"] = {"none": str(error)}
            return model.checked["files"]
        fresh = Codec(model, self.digest, self.threads, self.multiple, tile=None)
        padded, unpad = pad_to_multiple(piece[None], self.multiple)
        device = next(model.buffers()).device
        x_hat = model(padded.to(device, torch.float32) / 255)["x_hat"].cpu()
        expected = crop_back((x_hat * 255).round().to(torch.uint8), unpad)[0]
        if not torch.equal(fresh.decode(data), expected):
            raise InputError(
                "a file of this model does not decode to the pixels of its own forward, which depends on "
                "something else than the image (random numbers, earlier images?); mend the codec and "
                "quantize it again"
            )
        model.checked["files"] = {"height": piece.shape[-2], "width": piece.shape[-1], "bytes": len(data)}
        return model.checked["files"]

    @plain_torch()
    def inspect(self, pixels: Tensor, batch: int = 1, device: torch.device | str = "cpu") -> dict:
        """What the integer program computes for an image, without any coding of symbols.

        Args:
            pixels: uint8 (3, H, W).
            batch: images that go through together: this one, and copies of it that are shifted sideways.
            device: where the program runs.

        Returns:
            {"latents": for each latent, in the order of coding, {"symbols", and the parameters of their
            density, as "scales"}, "pixels": uint8 (3, H, W)}, all of them integers.
        """
        padded, unpad = pad_to_multiple(pixels[None], self.multiple)
        images = torch.cat([padded, *(padded.roll(7 * copy, -1) for copy in range(1, batch))])
        self._set_gain(self.gain(None))
        program, numbers = Plan(self._lowered(padded.shape[-2], padded.shape[-1], batch), None).outputs()
        complete = replace(program, outputs={**numbers, "pixels": program.outputs["pixels"]})
        results = executable(complete, self.threads, device)({"pixels": images.to(device)})
        latents: dict[int, dict[str, Tensor]] = {}
        for name in numbers:  # "1.scales": of the second latent
            position, _, what = name.partition(".")
            latents.setdefault(int(position), {})[what] = results[name][:1].cpu()
        return {
            "latents": [latents[position] for position in sorted(latents)],
            "pixels": crop_back(results["pixels"][:1].cpu(), unpad)[0].contiguous(),
        }

    def gain(self, level: float | None) -> int:
        """The gain that a file states for a level, in units of `GAIN_UNIT`; 0 for a codec of one rate.

        Args:
            level: from 1; None: the rate that the model is set to.

        Raises:
            InputError: a level that the codec does not have.
        """
        if not self.variable:
            if level is not None:
                raise InputError("this codec has one rate; leave out the level")
            return 0
        network = self._network
        try:
            gain = float(network.rate) if level is None else network.gain(level)
        except OverflowError:
            gain = float("inf")
        if level is not None and not (level > 0 and gain <= MAX_GAIN):
            raise InputError(
                f"a rate of {level:g} is out of range; choose a number from 1 to {network.levels}"
            )
        if not gain <= MAX_GAIN:
            raise InputError(f"a gain of {gain:g} is out of range; choose one of at most {MAX_GAIN}")
        return max(1, round(gain / GAIN_UNIT))

    def settle_rate(self) -> None:
        """Round the gain of a variable-rate model to one that files can state.

        From then on the model's forward gives the pixels that its files decode to.
        """
        self._set_gain(self.gain(None))

    def _names(self) -> tuple[bytes, ...]:
        """What files of this model may name it by."""
        file = self.model.file_sha256
        return (self.digest,) if file is None else (self.digest, bytes.fromhex(file)[:MODEL_BYTES])

    def _plan(self, height: int, width: int, gain: int) -> Plan:
        key = (height, width, gain)
        self._set_gain(gain)
        if key not in self._plans:
            self._plans[key] = Plan(self._lowered(height, width), self.sizes, self.threads)
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _set_gain(self, gain: int) -> None:
        if gain:
            self._network.set_factor(gain * GAIN_UNIT)

    def _lowered(self, height: int, width: int, batch: int = 1) -> Program:
        program = lower(self.model, height, width, batch)
        given, made = (program.values[port["pixels"]].shape for port in (program.inputs, program.outputs))
        if given != made:
            raise InputError(
                f"the codec turns {height}x{width} pixels into {made[-2]}x{made[-1]}; give `multiple` a "
                f"multiple of its total stride (now {self.multiple})"
            )
        return program
