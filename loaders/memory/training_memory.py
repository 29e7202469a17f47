"""What is reported of the memory that training takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .sharding import Sharding
from .step.simulation import Moment


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of the memory at its peak."""

    name: str
    bytes: int
    origin: str
    """Where the number comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What fits on a GPU."""

    gigabytes: int
    fits: bool
    largest_batch: int
    """Sequences of the length asked for; 0 if not even one fits."""
    largest_length: int
    """Tokens of each sequence in a batch of the size asked for; 0 if not even one fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """The peak of one training step on one GPU, after the first step: optimizer states are there."""

    method: str
    """`full`, `lora` or `qlora`."""
    batch_size: int
    length: int
    length_origin: str
    attention: str
    sharding: Sharding | None
    parts: tuple[Part, ...]
    """Of the moment when memory is highest; they add up to `total`."""
    moment: str
    """That moment."""
    all_logits: bool
    """Whether the loss is computed of all logits at once."""
    moments: tuple[Moment, ...]
    """All candidates for the peak, without what is there all the time."""
    gradient_bytes: int
    """Of all gradients on one GPU; at the peak, fewer may be there."""
    saved_bytes: int
    """Saved for the backward pass."""
    with_checkpointing: int | None
    """`total` if gradient checkpointing alone were turned on; None where it is on, or the model has none."""
    fits: tuple[Fit, ...]
    """For each of `GPU_GIGABYTES`."""

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return sum(part.bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "total_bytes": self.total}


@dataclass(frozen=True, kw_only=True, slots=True)
class NoEstimate:
    """A way of training that this model can't have, or whose step can't be simulated."""

    method: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Excess:
    """A method that takes more than the one before it, though it trains less, and the part that is to blame."""

    method: str
    other: str
    bytes: int
    """How much more."""
    part: str
    """The one that takes more than the other method's by most."""
    part_bytes: int
    other_bytes: int


def excesses(methods: Iterable[TrainingMemory]) -> Iterator[Excess]:
    """Of `methods`, full fine-tuning first and QLoRA last, those that take more than the one before."""
    for other, method in pairwise(methods):
        if method.total > other.total:
            sizes = {part.name: part.bytes for part in other.parts}
            blamed = max(method.parts, key=lambda part: part.bytes - sizes.get(part.name, 0))
            yield Excess(
                method=method.method,
                other=other.method,
                bytes=method.total - other.total,
                part=blamed.name,
                part_bytes=blamed.bytes,
                other_bytes=sizes.get(blamed.name, 0),
            )
