"""Estimates of training memory with chosen bytes, for what shows or compares them."""

from __future__ import annotations

from collections.abc import Mapping

from ftload.loaders.memory.step.simulation import Moment
from ftload.loaders.memory.training_memory import Fit, Part, TrainingMemory
from ftload.loaders.memory.what_fits import GIGABYTE, GPU_GIGABYTES

LAYERS = 4
MOMENTS = (
    "loss",
    *(f"backward pass of layer {number}" for number in range(LAYERS, 0, -1)),
    "end of the backward pass",
    "optimizer step",
)


def training_memory(
    method: str,
    parts: Mapping[str, int],
    *,
    moment: str = "loss",
    all_logits: bool = True,
    with_checkpointing: int | None = None,
) -> TrainingMemory:
    """Of a model of four layers; it fits where its total does."""
    total = sum(parts.values())
    moments = [Moment(name=name, activations=0, logits=0, gradients=0, temporary=0) for name in MOMENTS]
    return TrainingMemory(
        method=method,
        batch_size=8,
        length=4096,
        length_origin="max_seq_length",
        attention="sdpa",
        sharding=None,
        parts=tuple(Part(name=name, bytes=size, origin="counted") for name, size in parts.items()),
        moment=moment,
        all_logits=all_logits,
        moments=tuple(moments),
        gradient_bytes=0,
        saved_bytes=0,
        with_checkpointing=with_checkpointing,
        fits=tuple(
            Fit(gigabytes=size, fits=total <= size * GIGABYTE, largest_batch=10 * size, largest_length=10_000 * size)
            for size in GPU_GIGABYTES
        ),
    )
