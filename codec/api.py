"""Images to .licq files and back, with a quantized model."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from licq.codec.coder import Coder
from licq.codec.container import GAIN_UNIT, MAX_GAIN, MAX_PIXELS, MODEL_BYTES, TILE, Container
from licq.codec.plan import Plan
from licq.codec.sizes import Sizes
from licq.data.padding import crop_back, pad_to_multiple
from licq.integer.execution import executable
from licq.integer.lowering import lower
from licq.integer.program import Program
from licq.models.registry import architecture_of, get_architecture
from licq.quant.model import QuantModel
from licq.support.errors import InputError
from licq.support.files import sha256

_PLANS = 2  # sizes whose programs are kept


class Codec:
    """A frozen model that writes and reads files.

    Args:
        model: frozen.
        digest: what names the model in its files, at least four bytes: the SHA-256 of its own file.
        threads: of the kernels; None: PyTorch's.
        multiple: sides of the images that the network takes are multiples of it.
        tile: images of more than tile x tile pixels are computed in tiles, with the same result; None: all in
        one piece.
        progress: show how far the tiles of a large image are.
    """

    def __init__(
        self,
        model: QuantModel,
        digest: bytes,
        threads: int | None = None,
        multiple: int | None = None,
        tile: int | None = TILE,
        progress: bool = False,
    ):
        if not model.frozen:
            raise InputError("only a frozen model can write files; call freeze() after calibration")
        known = architecture_of(model.model)
        self.multiple = multiple or (get_architecture(known[0]).multiple if known else 64)
        self.model, self.digest, self.threads = model, digest[:MODEL_BYTES], threads
        self.variable = hasattr(model.model, "set_level")
        self._coder = Coder(model)
        self._plans: OrderedDict[tuple[int, int, int], Plan] = OrderedDict()
        self.sizes = Sizes(self._lowered, self.multiple, tile, progress)

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None, **options: Any) -> "Codec":
        """The codec of a file that `QuantModel.save` or main_ptq.py has written; `options` as of the
        class."""
        return cls(QuantModel.load(path), bytes.fromhex(sha256(path)), threads, **options)

    def encode(self, pixels: Tensor, level: float | None = None) -> bytes:
        """The file of one image.

        Args:
            pixels: (3, H, W), uint8.
            level: rate of a variable-rate codec, from 1; default: what the model is set to.

        Raises:
            InputError: a level for a codec without or out of range, too many pixels, or a codec whose forward
            has no bitstream.
        """
        gain = self.gain(level)
        height, width = pixels.shape[-2:]
        self._check_size(height, width)
        padded, _ = pad_to_multiple(pixels[None], self.multiple)
        plan = self._plan(*padded.shape[-2:], gain)
        return Container(self.digest, width, height, gain, (self._coder.encode(plan, padded),)).to_bytes()

    def decode(self, data: bytes) -> Tensor:
        """The image of a file, (3, H, W), uint8.

        Raises:
            InputError: damaged, or of another model.
        """
        content = Container.from_bytes(data)
        if content.model != self.digest:
            raise InputError(
                f"the file is of another model ({content.model.hex()}, this one is {self.digest.hex()}); give that with --model"
            )
        if bool(content.gain) != self.variable or len(content.streams) != 1:
            raise InputError("the file does not fit this model, though it names it; encode the image again")
        self._check_size(content.height, content.width)
        like, unpad = pad_to_multiple(
            torch.empty((1, 1, content.height, content.width), device="meta"), self.multiple
        )
        plan = self._plan(*like.shape[-2:], content.gain)
        return crop_back(self._coder.decode(plan, content.streams[0]), unpad)[0].contiguous()

    def inspect(self, pixels: Tensor, batch: int = 1, device: torch.device | str = "cpu") -> dict:
        """What the integer network computes for an image (3, H, W), uint8, in one pass.

        Args:
            batch: so many images go through at once: this one, and shifted copies of it.

        Returns:
            {"latents": [{"symbols", "scales" ...}], "pixels": (3, H, W)}, whole numbers.
        """
        padded, unpad = pad_to_multiple(pixels[None], self.multiple)
        together = torch.cat([padded, *(padded.roll(7 * place, -1) for place in range(1, batch))])
        self._set(self.gain(None))
        program = self._lowered(*padded.shape[-2:], batch)
        latents, outputs = Plan(program, None).outputs()
        whole = replace(latents, outputs={**outputs, "pixels": latents.outputs["pixels"]})
        found = executable(whole, self.threads, device)({"pixels": together.to(device)})
        names: dict[int, dict[str, Tensor]] = {}
        for name in outputs:
            place, _, what = name.partition(".")
            names.setdefault(int(place), {})[what] = found[name][:1].cpu()
        return {
            "latents": [names[place] for place in sorted(names)],
            "pixels": crop_back(found["pixels"][:1].cpu(), unpad)[0].contiguous(),
        }

    def gain(self, level: float | None) -> int:
        """What a file states for a level, in GAIN_UNITs; 0 for a codec of one rate. level: None: what the
        model is set to.

        Raises:
            InputError: a level for a codec without, or out of range.
        """
        if not self.variable:
            if level is not None:
                raise InputError("this codec has one rate; leave out the level")
            return 0
        network = self.model.model
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
        """Put the gain that a variable-rate model is set to where files can state it, so that its forward is
        what they decode to."""
        self._set(self.gain(None))

    def _check_size(self, height: int, width: int) -> None:
        """Raises InputError where the image, padded, is too large."""
        padded = [-(-side // self.multiple) * self.multiple for side in (height, width)]
        if padded[0] * padded[1] > MAX_PIXELS:
            raise InputError(
                f"an image of {width}x{height}, with its sides rounded up to multiples of {self.multiple}, is too large for one "
                f"file; cut it into parts of at most {MAX_PIXELS} pixels"
            )

    def _plan(self, height: int, width: int, gain: int) -> Plan:
        key = (height, width, gain)
        self._set(gain)
        if key not in self._plans:
            self._plans[key] = Plan(self._lowered(height, width), self.sizes, self.threads)
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _set(self, gain: int) -> None:
        if gain:
            self.model.model.set_factor(gain * GAIN_UNIT)

    def _lowered(self, height: int, width: int, batch: int = 1) -> Program:
        return lower(self.model, height, width, batch)
