"""Tensors of a checkpoint into which an adapter is merged when they are read, and those that it brings along."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..checkpoint.finite import all_finite
from ..checkpoint.formats.interface import PackedTensor, Read, read_elements
from ..checkpoint.plain import PlainReader
from ..checkpoint.tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta
from ..errors import CheckpointError
from .changes import LEAST_ROWS, Change

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedTensor(PackedTensor):
    """A tensor of the base with what an adapter changes of it."""

    base: TensorMeta
    """As it is without the adapter; another adapter may have been merged into it."""
    change: Change

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Read the base, in the dtype that the model has it in, and change it.

        Raises `CheckpointError` where the adapter is not finite, or makes the base so.
        """
        import torch

        columns, base = _columns(self.shape), self.base
        stored = read_elements(base, begin, end, read)
        values = stored.to(getattr(torch, TORCH_NAMES[self.dtype])).reshape(-1, columns)
        merged = self.change.apply(values, begin // columns, end // columns).reshape(-1)
        if not all_finite(merged) and all_finite(stored):
            adapter = self.change.factors.reader.source.model
            raise CheckpointError(
                f"merging the adapter `{adapter}` into tensor `{self.name}` gives NaN or infinity",
                hint="the adapter is damaged, or belongs to another model",
            )
        return merged

    def reading_bytes(self, elements: int) -> int:
        """The base as it is stored, in its dtype and with what decodes it, and what the change takes."""
        elements = min(max(elements, self.tile, LEAST_ROWS * _columns(self.shape)), self.parameters)
        base = elements * (ITEM_BYTES[self.base.dtype] + ITEM_BYTES[self.dtype]) + self.base.reading_bytes(elements)
        return base + self.change.factors.nbytes + self.change.memory(elements)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTensor(PackedTensor):
    """A tensor that an adapter brings along whole: a module that was trained, or an embedding that has grown."""

    reader: PlainReader

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Read it from the adapter's file."""
        return self.reader.values(self.parts[0], begin, end)

    def reading_bytes(self, elements: int) -> int:
        """Nothing: it is read as it is."""
        return 0


def merged_tensor(name: str, base: TensorMeta, dtype: str, change: Change) -> MergedTensor:
    """The tensor `name` of a checkpoint: `base`, in `dtype` (safetensors code), with a change."""
    columns, parameters = _columns(base.shape), prod(base.shape)
    rows = max(1, parameters // columns if change.whole else min(LEAST_ROWS, parameters // columns))
    return MergedTensor(
        name=name, shape=base.shape, dtype=dtype, file=base.file, begin=base.begin, end=base.end,
        format=base.format if isinstance(base, PackedTensor) else None, parts=base.stored_in, tag=base.counted_as,
        tile=rows * columns, base=base, change=change,
    )  # fmt: skip


def adapter_tensor(name: str, stored: TensorMeta, reader: PlainReader) -> AdapterTensor:
    """The tensor `name` of a checkpoint: one that lies in an adapter's file."""
    return AdapterTensor(
        name=name, shape=stored.shape, dtype=stored.dtype, file=stored.file, begin=stored.begin, end=stored.end,
        format=None, parts=(stored,), tag=TORCH_NAMES[stored.dtype], tile=1, reader=reader,
    )  # fmt: skip


def _columns(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1
