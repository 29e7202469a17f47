"""The GPU that training memory is drawn against: the one in this machine, or the smallest that suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..system.cuda import first_gpu
from .training_memory import NoEstimate, TrainingMemory
from .what_fits import GIGABYTE, GPU_GIGABYTES

_SOLD_WITHIN = 1.08
"""A GPU sold as 80 GB has up to 80 GiB, which are 7.4 % more bytes; some have 2 % less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenGpu:
    """One GPU, and why it is this one."""

    bytes: int
    reason: str
    """To go on after `80 GB, `."""

    @property
    def gigabytes(self) -> int | None:
        """The one of `GPU_GIGABYTES` that it is sold as; None if it is another."""
        size = self.bytes / GIGABYTE
        nearest = min(GPU_GIGABYTES, key=lambda sold: abs(sold - size))
        return nearest if 1 / _SOLD_WITHIN < size / nearest < _SOLD_WITHIN else None


def choose_gpu(methods: Sequence[TrainingMemory | NoEstimate], asked: str) -> ChosenGpu | None:
    """The GPU to draw against, where the method `asked` for is to be trained; None if no method has an estimate."""
    known = [method for method in methods if isinstance(method, TrainingMemory)]
    if not known:
        return None
    here = first_gpu()
    if here is not None:
        name, size = here
        return ChosenGpu(bytes=size, reason=f"the GPU of this machine: {name}")
    method = next((one for one in known if one.method == asked), known[0])
    size = smallest_gpu(method.total)
    if size is None:
        reason = f"the largest here, and {method.method} does not fit"
        return ChosenGpu(bytes=GPU_GIGABYTES[-1] * GIGABYTE, reason=reason)
    return ChosenGpu(bytes=size * GIGABYTE, reason=f"the smallest here on which {method.method} fits")


def smallest_gpu(total: int) -> int | None:
    """The smallest of `GPU_GIGABYTES` that has so many bytes; None if none has."""
    return next((size for size in GPU_GIGABYTES if total <= size * GIGABYTE), None)
