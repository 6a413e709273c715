"""Files to pixels and back with plans of the cache; the network and torch only where a plan is missing."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from licq.codec import plan_cache
from licq.codec.checks import check_content, check_size, image_of
from licq.codec.container import MODEL_BYTES, TILE, Container
from licq.codec.ready_plan import ReadyPlan, plain_plan, read_plan
from licq.data.margins import with_margins
from licq.integer.ready_files import NotStorable
from licq.support.errors import InputError
from licq.support.files import sha256
from licq.support.imports import uncollected

if TYPE_CHECKING:
    from licq.codec.api import Codec

_BOTH_WAYS = 2**20  # pixels of an image of which both plans are made at once
_OWN = ("licq", "compressai")  # packages whose networks follow from their versions


@dataclass(frozen=True)
class Facts:
    """What a codec's files depend on, besides the plans."""

    digest: bytes
    multiple: int
    variable: bool


class QuickCodec:
    """Codes images with the model of a file, as `Codec` does: the same files, the same pixels.

    Args:
        path: of the model.
        threads: CPU threads; None: as many as there are processors.
        tile: as in `Codec`.
        progress: as in `Codec`.

    Raises:
        InputError: no such file.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, tile: int | None = TILE, progress: bool = False
    ):
        self.path, self.threads, self.tile, self.progress = path, threads, tile, progress
        self._plans: dict[tuple, ReadyPlan] = {}  # the last one
        self._new: set[tuple] = set()  # keys of plans that are not in the cache
        try:
            self._sha256 = sha256(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error

    @functools.cached_property
    def codec(self) -> "Codec":
        """The codec with its network."""
        with uncollected():
            from licq.codec.api import Codec
            from licq.support.determinism import set_threads

        set_threads(self.threads)
        return Codec.load(self.path, self.threads, tile=self.tile)

    @functools.cached_property
    def facts(self) -> Facts:
        """Those of the model."""
        entry = plan_cache.read(self._sha256, "facts")
        if entry is not None:
            digest, multiple, variable = entry[0]
            return Facts(bytes.fromhex(digest), multiple, variable)
        facts = Facts(self.codec.digest, self.codec.multiple, self.codec.variable)
        if self._is_own:
            plan_cache.write([facts.digest.hex(), facts.multiple, facts.variable], [], self._sha256, "facts")
        return facts

    @property
    def variable(self) -> bool:
        """Whether the codec has many rates."""
        return self.facts.variable

    @property
    def _is_own(self) -> bool:
        return type(self.codec.model.model).__module__.partition(".")[0] in _OWN

    def gain(self, level: float | None) -> int:
        """The gain that a file states for a level; see `Codec.gain`."""
        if not self.variable:
            if level is not None:
                raise InputError("this codec has one rate; leave out the level")
            return 0
        entry = plan_cache.read(self._sha256, "gain", level)
        if entry is not None:
            return entry[0]
        gain = self.codec.gain(level)
        if self._is_own:
            plan_cache.write(gain, [], self._sha256, "gain", level)
        return gain

    def encode(self, pixels: np.ndarray, level: float | None = None) -> bytes:
        """The content of a .licq file; see `Codec.encode`. pixels: uint8 (3, H, W), or (1, H, W)."""
        height, width = pixels.shape[-2:]
        grey, colours = len(pixels) == 1, np.broadcast_to(pixels, (3, height, width))
        gain, multiple = self.gain(level), self.facts.multiple
        size = check_size(height, width, multiple)
        plan = self._plan("encode", *size, gain, level=level, pixels=colours)
        stream = plan.coder.encode(plan, with_margins(colours[None], multiple))
        self._keep(plan, "encode", *size, gain)
        return Container(self.facts.digest[:MODEL_BYTES], width, height, gain, (stream,), grey).to_bytes()

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (3, H, W) or (1, H, W), of the content of a .licq file; see `Codec.decode`."""
        content, facts = Container.from_bytes(data), self.facts
        names = facts.digest[:MODEL_BYTES], bytes.fromhex(self._sha256)[:MODEL_BYTES]
        height, width = check_content(content, names, facts.variable, facts.multiple)
        plan = self._plan("decode", height, width, content.gain)
        pixels = plan.coder.decode(plan, content.streams[0])
        self._keep(plan, "decode", height, width, content.gain)
        return image_of(content, pixels, facts.multiple)

    def _plan(
        self,
        what: str,
        height: int,
        width: int,
        gain: int,
        level: float | None = None,
        pixels: np.ndarray | None = None,
    ) -> ReadyPlan:
        """The plan of one direction, for images of height x width with their padding.

        Args:
            level, pixels: of the image to encode. A model that is not checked yet is checked on it first.
        """
        key = (what, height, width, gain)
        if key not in self._plans:
            plan = self._stored(key)
            if plan is None:
                self._new.add(key)
                if pixels is not None:
                    self.codec.check_once(pixels, level)
                plan = self.codec.ready_plan(*key)
            self._plans.clear()
            self._plans[key] = plan
        plan = self._plans[key]
        plan.show(self.progress)
        return plan

    def _stored(self, key: tuple) -> ReadyPlan | None:
        entry = plan_cache.read(self._sha256, self.tile, *key)
        if entry is None:
            return None
        try:
            plan = read_plan(*entry)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, InputError):
            return None
        plan.set_threads(self.threads)
        return plan

    def _keep(self, plan: ReadyPlan, what: str, height: int, width: int, gain: int) -> None:
        """Write a plan that was made here, once it has run; of a small image also that of the way back."""
        key = (what, height, width, gain)
        if key not in self._new or not self._is_own:
            return
        self._new.discard(key)
        plans = {key: plan}
        other = ("decode" if what == "encode" else "encode", height, width, gain)
        if height * width <= _BOTH_WAYS and plan_cache.read(self._sha256, self.tile, *other) is None:
            with contextlib.suppress(InputError):
                plans[other] = self.codec.ready_plan(*other)
        for name, made in plans.items():
            with contextlib.suppress(NotStorable):
                content, arrays = plain_plan(made)
                plan_cache.write(content, arrays, self._sha256, self.tile, *name)
