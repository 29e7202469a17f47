"""How a step's peaks grow with its batch, and the largest batch that fits on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, inf, sqrt
from typing import TYPE_CHECKING

from .step.setting import Batch, Setting
from .step.simulation import Footprint, Moment, Simulation
from .training_memory import Fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..flags.declared import FlatArguments
    from ..plan.plan import Plan


GPU_GIGABYTES = (16, 24, 32, 40, 48, 80, 96, 141, 192)
"""The memories that GPUs are sold with."""
GIGABYTE = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Bytes at a moment as they grow with a batch of b sequences of s tokens: c + e · s + b · (x · s + y · s²)."""

    c: float
    e: float
    x: float
    y: float

    def largest_size(self, room: int, length: int) -> float:
        """The b that fills `room` bytes."""
        each = self.x * length + self.y * length**2
        return (room - self.c - self.e * length) / each if each > 0 else inf

    def largest_length(self, room: int, size: int) -> float:
        """The s that fills `room` bytes."""
        left, linear, square = room - self.c, self.e + size * self.x, size * self.y
        if left <= 0 or square <= 0:
            return left / linear if linear > 0 else inf
        return (sqrt(linear**2 + 4 * square * left) - linear) / (2 * square)


class Simulations:
    """Simulated steps that estimates share: each setting of a model is set up once, and each batch run once."""

    def __init__(self) -> None:
        self._set_up: dict[tuple[PreTrainedModel, Setting], Simulation] = {}
        self._run: dict[tuple[PreTrainedModel, Setting, Batch, bool], Footprint] = {}

    def run(self, model: PreTrainedModel, setting: Setting, batch: Batch, *, accumulate: bool) -> Footprint:
        """As `Simulation.run`."""
        key = model, setting, batch, accumulate
        if key not in self._run:
            if key[:2] not in self._set_up:
                self._set_up[key[:2]] = Simulation(model, setting)
            self._run[key] = self._set_up[key[:2]].run(batch, accumulate=accumulate)
        return self._run[key]


class Footprints:
    """The footprints of batches of one model, setting and set of flags."""

    def __init__(self, plan: Plan, flags: FlatArguments, setting: Setting, simulations: Simulations) -> None:
        self._model, self._setting, self._simulations = plan.skeleton.model, setting, simulations
        self._accumulate = flags.gradient_accumulation_steps > 1
        self._packing = flags.packing
        self._masks = setting.attention == "sdpa"

    def of(self, size: int, length: int, *, padded: bool) -> Footprint:
        """The footprint of a batch; where sequences are padded, sdpa needs a mask."""
        batch = Batch(size=size, length=length, padded=padded and self._masks)
        if self._packing:
            # one long sequence without padding; sdpa separates the sequences by a mask
            batch = Batch(size=1, length=size * length, padded=self._masks)
        return self._simulations.run(self._model, self._setting, batch, accumulate=self._accumulate)

    def curves(self, size: int, length: int) -> tuple[Curve, ...]:
        """How each moment grows, from four batches: this one, twice as many sequences, twice as long ones, and both."""
        padded = size > 1  # a sequence that is alone in its batch is not padded
        batches = ((size, length), (2 * size, length), (size, 2 * length), (2 * size, 2 * length))
        curves = []
        for moments in zip(*(self.of(b, s, padded=padded).moments for b, s in batches), strict=True):
            once, more, longer, both = (moment.total for moment in moments)
            each, each_longer = (more - once) / size, (both - longer) / size
            square = (each_longer - 2 * each) / 2
            if abs(square) < each / 1000:
                square = 0.0  # what the allocator's rounding leaves
            constant, constant_longer = 2 * once - more, 2 * longer - both
            curves.append(
                Curve(
                    c=2 * constant - constant_longer,
                    e=(constant_longer - constant) / length,
                    x=(each - square) / length,
                    y=square / length**2,
                )
            )
        return tuple(curves)


class Fits:
    """What fits on a GPU, for a batch of `size` sequences of `length` tokens and what could be in its place."""

    def __init__(self, footprints: Footprints, *, size: int, length: int) -> None:
        self._size, self._length = size, length
        self._simulated = footprints.of(size, length, padded=size > 1).moments
        self._by_size = footprints.curves(max(size, 2), length)
        self._by_length = footprints.curves(size, length)

    def on(self, gigabytes: int, *, lasting: int, moments: tuple[Moment, ...], update: Moment) -> Fit:
        """What fits on a GPU of so many gigabytes.

        `lasting` bytes are there all the time. `moments` are those simulated, as sharding leaves them; `update` is the
        optimizer's step, which does not depend on the batch.
        """
        room = gigabytes * GIGABYTE - lasting
        fits = max(moment.total for moment in (*moments, update)) <= room
        largest_size = largest_length = 0
        if update.total <= room:
            # what sharding takes off a moment, or adds to it, does not depend on the batch
            rooms = [room + one.total - on_gpu.total for one, on_gpu in zip(self._simulated, moments, strict=True)]
            largest_size = _whole(
                curve.largest_size(left, self._length) for curve, left in zip(self._by_size, rooms, strict=True)
            )
            largest_length = _whole(
                curve.largest_length(left, self._size) for curve, left in zip(self._by_length, rooms, strict=True)
            )
        if self._size == 1 and largest_size < 2:
            largest_size = int(fits)
        return Fit(gigabytes=gigabytes, fits=fits, largest_batch=largest_size, largest_length=largest_length)


def _whole(bounds: Iterable[float]) -> int:
    return max(0, floor(min(bounds)))
