"""How the tensors of an output file are made: a few kinds of work, each for one piece of a model at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.formats.interface import PackedTensor
from ..checkpoint.tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta
from ..model.tensor_map import Conversion, ModelTensor
from .step import Inputs, Operation, OutputTensor, Sink, Step, cast_bytes, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Cast:
    """Copy a tensor, in another dtype if need be."""

    source: TensorMeta
    name: str
    dtype: str
    """safetensors code."""
    codes: bool = False
    """Packed 4-bit codes: whatever dtype holds them, they may look like NaN."""

    @property
    def changes_nothing(self) -> bool:
        """Whether name and bytes stay the same."""
        same = (self.name, self.dtype) == (self.source.name, self.source.dtype)
        return same and not isinstance(self.source, PackedTensor)

    def memory(self, chunk_bytes: int) -> int:
        """A chunk and, where the dtype differs, its cast."""
        return min(chunk_bytes, self.source.nbytes) + cast_bytes(self.source, self.dtype, chunk_bytes)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read, cast and write chunk by chunk."""
        for values in inputs.chunks(self.source, self.dtype, checked=not self.codes):
            sink.write(self.name, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Set:
    """Copy a buffer of which transformers sets some elements when it has loaded it."""

    source: TensorMeta
    name: str
    dtype: str
    """safetensors code."""
    values: Tensor
    """What they are set to; NaN elsewhere."""

    def memory(self, chunk_bytes: int) -> int:
        """The buffer as it is stored, its cast and the result."""
        n = self.source.parameters
        return self.source.nbytes + self.source.reading_bytes(n) + 2 * n * ITEM_BYTES[self.dtype]

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read it whole: buffers are small."""
        stored = inputs.read(self.source, self.dtype)
        sink.write(self.name, stored.where(self.values.isnan(), self.values.to(stored.dtype)))


@dataclass(frozen=True, kw_only=True, eq=False)
class All:
    """Several operations, one after another."""

    operations: tuple[Operation, ...]

    def memory(self, chunk_bytes: int) -> int:
        """As the largest of them."""
        return max(operation.memory(chunk_bytes) for operation in self.operations)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Run each."""
        for operation in self.operations:
            operation.run(inputs, sink)


_ROWS_SUMMED = 64
"""Rows that are added up before their sum is added to the total."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grow:
    """Copy an embedding or head (rows × …) and append rows: those sampled beforehand, else the mean of the old ones."""

    source: TensorMeta
    name: str
    parameter: str
    """The model's name for it."""
    dtype: str
    new_rows: int

    def memory(self, chunk_bytes: int) -> int:
        """A chunk, its cast, its float32 copy, the running sums and the new rows."""
        row = self._row
        chunk = max(chunk_bytes // ITEM_BYTES[self.source.dtype], row * _ROWS_SUMMED)
        return (
            chunk * (ITEM_BYTES[self.source.dtype] + ITEM_BYTES[self.dtype] + 4)
            + self.source.reading_bytes(chunk)
            + row * (24 + 8 * self.new_rows)
        )

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """One pass; the mean is summed in float64 in an order that depends on neither chunks nor threads."""
        import torch

        total: Any = 0.0
        for values in inputs.chunks(self.source, self.dtype, multiple=self._row * _ROWS_SUMMED):
            sink.write(self.name, values)
            rows = values.to(torch.float32).reshape(-1, self._row)
            for group in rows.split(_ROWS_SUMMED):
                total = total + group.numpy().sum(axis=0, dtype="float64")
        if self.name in inputs.new_rows:
            new = inputs.new_rows[self.name]
        else:
            mean = torch.as_tensor(total / self.source.shape[0])
            new = mean.to(torch.float32).to(torch_dtype(self.dtype)).expand(self.new_rows, self._row)
        sink.write(self.name, new)

    @property
    def _row(self) -> int:
        """Elements in a row: 1 for a bias."""
        return prod(self.source.shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Convert:
    """Tensors that transformers merges or splits: all of one conversion are held at once."""

    conversion: Conversion
    sources: tuple[TensorMeta, ...]
    dtype: str

    def memory(self, chunk_bytes: int) -> int:
        """The largest source, all of them cast, and both steps of the conversion."""
        cast = sum(meta.parameters for meta in self.sources) * ITEM_BYTES[self.dtype]
        return max(meta.nbytes + meta.reading_bytes(meta.parameters) for meta in self.sources) + 3 * cast

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read, cast as the loader would, convert, and write what comes out."""
        values = {meta.name: inputs.read(meta, self.dtype) for meta in self.sources}
        for name, value in self.conversion.run(values).items():
            sink.write(name, value)


def plain_step(tensors: tuple[ModelTensor, ...]) -> Step:
    """Write one tensor, or all that come out of one conversion, in the dtype that the reference loads them with."""
    tensor = tensors[0]
    (source, *_) = tensor.sources
    if tensor.conversion is not None:
        operation: Operation = Convert(conversion=tensor.conversion, sources=tensor.sources, dtype=tensor.dtype)
    elif tensor.rows_before is not None:
        operation = Grow(
            source=source,
            name=tensor.name,
            parameter=tensor.parameter,
            dtype=tensor.dtype,
            new_rows=tensor.shape[0] - tensor.rows_before,
        )
    elif tensor.set_after_loading is not None:
        operation = Set(source=source, name=tensor.name, dtype=tensor.dtype, values=tensor.set_after_loading)
    else:
        operation = Cast(source=source, name=tensor.name, dtype=tensor.dtype)
    return Step(operation=operation, outputs=tuple(_plain_output(tensor) for tensor in tensors))


def _plain_output(tensor: ModelTensor) -> OutputTensor:
    return OutputTensor(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        component=tensor.component,
        counted_as=TORCH_NAMES[tensor.dtype],
        parameters=0 if tensor.buffer else prod(tensor.shape) - tensor.padding,
    )
