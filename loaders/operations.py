"""How the tensors of an output file are made: a few kinds of work, each for one piece of a model at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, Protocol

from .nf4 import BLOCK, Encoder, compress_statistics
from .catalog import Component, LinearLayer
from .checkpoint import ITEM_BYTES, TORCH_NAMES, Checkpoint, TensorMeta
from .finite import check_finite
from .tensor_map import Conversion, ModelTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Sink(Protocol):
    """Where finished tensors go."""

    def write(self, name: str, values: Tensor) -> None:
        """Append the bytes of `values` to the tensor `name`."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What operations read, and how much of it at once."""

    checkpoint: Checkpoint
    chunk_bytes: int
    encode: Encoder | None = None
    """Of the quantisation, where there is one."""
    new_rows: Mapping[str, Tensor] = field(default_factory=dict)
    """Rows for grown embeddings, by output name, where they were drawn beforehand."""
    _local: threading.local = field(default_factory=threading.local)

    def chunks(self, tensor: TensorMeta, dtype: str, *, multiple: int = 1, checked: bool = True) -> Iterator[Tensor]:
        """Flat chunks in `dtype` (safetensors code): about `chunk_bytes` as stored, a multiple of so many elements.

        Each is gone when the next comes. Raises `CheckpointError` naming the tensor when it holds NaN, infinity, or
        what becomes infinite in `dtype`, unless that is not `checked`.
        """
        for chunk in self._stored(tensor, multiple):
            values = chunk.to(_torch_dtype(dtype))
            if checked:
                check_finite(values, chunk, tensor)
            yield values

    def read(self, tensor: TensorMeta, dtype: str, *, checked: bool = True) -> Tensor:
        """The whole tensor in its shape; otherwise as `chunks`."""
        stored = self.checkpoint.read(tensor)
        values = stored.to(_torch_dtype(dtype))
        if checked:
            check_finite(values, stored, tensor)
        return values

    def _stored(self, tensor: TensorMeta, multiple: int) -> Iterator[Tensor]:
        elements = max(1, self.chunk_bytes // ITEM_BYTES[tensor.dtype] // multiple) * multiple
        # one buffer a thread: fresh memory would have to be zeroed, chunk after chunk
        if not hasattr(self._local, "buffer"):
            self._local.buffer = bytearray(self.chunk_bytes)
        chunks = self.checkpoint.chunks(tensor, elements, self._local.buffer)
        while True:
            begin = time.perf_counter()
            chunk = next(chunks, None)
            self._local.seconds = getattr(self._local, "seconds", 0.0) + time.perf_counter() - begin
            if chunk is None:
                return
            yield chunk

    def take_seconds(self) -> float:
        """The time that this thread has spent on reading chunks since it last asked."""
        seconds, self._local.seconds = getattr(self._local, "seconds", 0.0), 0.0
        return seconds


class Operation(Protocol):
    """Makes one or more output tensors. Holds one chunk in memory, or one tensor where it must."""

    def memory(self, chunk_bytes: int) -> int:
        """The bytes that it allocates at most, at a time."""
        ...

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read, convert and write."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputTensor:
    """One tensor of an output file, known before anything is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors code."""
    component: Component
    counted_as: str
    """The dtype that reports count it under: `nf4` for all that a 4-bit weight is stored in, else torch's name."""
    parameters: int
    """Logical parameters: of a 4-bit weight's tensors only the codes count any."""
    variable: bool = False
    """A JSON state, whose length is known only once the data are: `shape` is the longest it can be."""

    @property
    def nbytes(self) -> int:
        """Stored size in bytes; the largest possible for a variable one."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One unit of work: an operation and all that it writes, into one file."""

    operation: Operation
    outputs: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return sum(output.nbytes for output in self.outputs)


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
        return (self.name, self.dtype) == (self.source.name, self.source.dtype)

    def memory(self, chunk_bytes: int) -> int:
        """A chunk and, where the dtype differs, its cast."""
        return min(chunk_bytes, self.source.nbytes) + _cast_bytes(self.source, self.dtype, chunk_bytes)

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
        return self.source.nbytes + 2 * self.source.parameters * ITEM_BYTES[self.dtype]

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
    """Copy an embedding or head (rows × …) and append rows: those drawn beforehand, else the mean of the old ones."""

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
        return chunk * (ITEM_BYTES[self.source.dtype] + ITEM_BYTES[self.dtype] + 4) + row * (24 + 8 * self.new_rows)

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
            new = mean.to(torch.float32).to(_torch_dtype(self.dtype)).expand(self.new_rows, self._row)
        sink.write(self.name, new)

    @property
    def _row(self) -> int:
        """Elements in a row: 1 for a bias."""
        return prod(self.source.shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize:
    """Encode a weight as NF4 with double quantisation."""

    source: TensorMeta
    name: str
    transposed: bool
    """GPT-2's Conv1D stores (in, out); bitsandbytes wants (out, in)."""
    dtype: str
    """safetensors code of what it is cast to before: BF16, or F32 where the architecture keeps the layer so."""

    def memory(self, chunk_bytes: int) -> int:
        """A chunk, its cast, its codes, and the blocks' maxima four times; the whole tensor if it is transposed."""
        if self.transposed:
            chunk_bytes = max(chunk_bytes, self.source.nbytes)
        elements = min(chunk_bytes // ITEM_BYTES[self.source.dtype], self.source.parameters)
        return (
            chunk_bytes
            + _cast_bytes(self.source, self.dtype, chunk_bytes)
            + elements // 2
            + (ITEM_BYTES[self.dtype] * elements if self.transposed else 0)
            + self.source.parameters // BLOCK * 4 * 4
        )

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Encode chunk by chunk; the blocks' maxima (n/64 float32) are held until the end.

        Raises `CheckpointError` naming the tensor when it holds NaN or infinity.
        """
        import torch

        assert inputs.encode is not None
        shape = self.source.shape[::-1] if self.transposed else self.source.shape
        # the encoder finds what is not finite at no cost
        if self.transposed:
            chunks: Iterable[Tensor] = [inputs.read(self.source, self.dtype, checked=False).T]
        else:
            chunks = inputs.chunks(self.source, self.dtype, multiple=BLOCK, checked=False)
        maxima = []
        for values in chunks:
            try:
                codes, absmax = inputs.encode(values)
            except ValueError:
                inputs.read(self.source, self.dtype)  # says more of it
                raise
            sink.write(self.name, codes)
            maxima.append(absmax)
        for suffix, value in compress_statistics(torch.cat(maxima), shape, TORCH_NAMES[self.dtype]).items():
            sink.write(self.name + suffix, value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Convert:
    """Tensors that transformers merges or splits: all of one conversion are held at once."""

    conversion: Conversion
    sources: tuple[TensorMeta, ...]
    dtype: str

    def memory(self, chunk_bytes: int) -> int:
        """The largest source, all of them cast, and both steps of the conversion."""
        cast = sum(meta.parameters for meta in self.sources) * ITEM_BYTES[self.dtype]
        return max(meta.nbytes for meta in self.sources) + 3 * cast

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read, cast as the loader would, convert, and write what comes out."""
        values = {meta.name: inputs.read(meta, self.dtype) for meta in self.sources}
        for name, value in self.conversion.run(values).items():
            sink.write(name, value)


@dataclass(frozen=True, kw_only=True, eq=False)
class InitLora:
    """The fresh adapter of one linear layer: A drawn, B zero, both float32.

    Draws from torch's global generator exactly as PEFT does when it wraps the layer: two `torch.nn.Linear` are made and
    then A is drawn again (peft/tuners/lora/layer.py, `update_layer`).
    """

    layer: LinearLayer
    rank: int
    names: tuple[str, str]
    """Output names of A (rank × in_features) and B (out_features × rank)."""
    rounded_to: str
    """safetensors code: PEFT moves a new adapter to its layer's dtype, and only then casts it to float32."""

    def memory(self, chunk_bytes: int) -> int:
        """A in float32 and rounded, and B twice."""
        return self.rank * (self.layer.in_features * 12 + self.layer.out_features * 8)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Draw A and write both."""
        import torch

        a = torch.nn.Linear(self.layer.in_features, self.rank, bias=False)
        b = torch.nn.Linear(self.rank, self.layer.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(a.weight, a=sqrt(5))
        weight = a.weight.detach().to(_torch_dtype(self.rounded_to)).to(torch.float32)
        sink.write(self.names[0], weight)
        sink.write(self.names[1], torch.zeros_like(b.weight))


def _cast_bytes(source: TensorMeta, dtype: str, chunk_bytes: int) -> int:
    """Bytes of a chunk in another dtype; none where it is the same."""
    if source.dtype == dtype:
        return 0
    return min(chunk_bytes // ITEM_BYTES[source.dtype], source.parameters) * ITEM_BYTES[dtype]


def _torch_dtype(code: str) -> torch.dtype:
    import torch

    return getattr(torch, TORCH_NAMES[code])


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
