"""The GPU that training memory is drawn against: of `--fit`, of this machine, or the smallest that suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..system.cuda import first_gpu
from .training_memory import NoEstimate, TrainingMemory
from .what_fits import GIGABYTE, GPU_GIGABYTES

if TYPE_CHECKING:
    from .advice import Advice
    from .sharding import Sharding

_SOLD_WITHIN = 1.08
"""A GPU sold as 80 GB has up to 80 GiB, which are 7.4 % more bytes; some have 2 % less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenGpu:
    """One GPU, and why it is this one."""

    bytes: int
    gigabytes: int | None
    """The one of `GPU_GIGABYTES` that it is; None if it is another."""
    reason: str
    """To go on after `80 GB, `."""


def choose_gpu(
    methods: Sequence[TrainingMemory | NoEstimate], asked: str, advice: Sequence[Advice] = ()
) -> ChosenGpu | None:
    """The GPU to draw against, where the method `asked` for is to be trained; None if no method has an estimate.

    `advice` is that of `--fit`. Of its GPUs, the first is taken of those that are as many as training is counted for.
    """
    known = [method for method in methods if isinstance(method, TrainingMemory)]
    if not known:
        return None
    if advice:
        return _of_fit(known[0].sharding, advice)
    here = first_gpu()
    if here is not None:
        name, size = here
        return ChosenGpu(bytes=size, gigabytes=sold_as(size), reason=f"the GPU of this machine: {name}")
    method = next((one for one in known if one.method == asked), known[0])
    size = smallest_gpu(method.total)
    reason = f"the smallest here on which {method.method} fits"
    if size is None:
        size, reason = GPU_GIGABYTES[-1], f"the largest here, and {method.method} does not fit"
    return ChosenGpu(bytes=size * GIGABYTE, gigabytes=size, reason=reason)


def _of_fit(sharding: Sharding | None, advice: Sequence[Advice]) -> ChosenGpu:
    count = 1 if sharding is None else sharding.gpus
    alike = [one for one in advice if one.gpu_count == count]
    one = (*alike, *advice)[0]
    reason = f"{'the one' if one.gpu_count == 1 else 'each'} of --fit {one.gpus}"
    if not alike:
        reason += "; nothing is divided here" if count == 1 else f"; these are shares of {count:,} GPUs"
    whole = one.gpu_bytes // GIGABYTE
    is_sold = one.gpu_bytes == whole * GIGABYTE and whole in GPU_GIGABYTES
    return ChosenGpu(bytes=one.gpu_bytes, gigabytes=whole if is_sold else None, reason=reason)


def sold_as(size: int) -> int | None:
    """The one of `GPU_GIGABYTES` as which a GPU with so many bytes is sold; None if it is another."""
    nearest = min(GPU_GIGABYTES, key=lambda gigabytes: abs(gigabytes * GIGABYTE - size))
    return nearest if 1 / _SOLD_WITHIN < size / (nearest * GIGABYTE) < _SOLD_WITHIN else None


def smallest_gpu(total: int) -> int | None:
    """The smallest of `GPU_GIGABYTES` that has so many bytes; None if none has."""
    return next((size for size in GPU_GIGABYTES if total <= size * GIGABYTE), None)
