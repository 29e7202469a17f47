"""A unit of work: what it reads, what it writes, and the memory that it takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Protocol

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.finite import check_finite
from ..checkpoint.tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta
from ..model.components import Component
from ..progress import Silent, Stopwatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Encoder(Protocol):
    """Quantises pieces of a weight that begin at a block."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """bfloat16, float16 or float32 of any shape → codes (uint8), absmax (float32, one a block).

        The codes may lie in memory that the next call from the same thread uses again. Raises `ValueError` for NaN and
        infinity, which would spoil the whole weight without a word.
        """
        ...


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
    """Rows for grown embeddings, by output name, where they were sampled beforehand."""
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    """What stands in the place of the checkpoint's tensors, by their names."""
    watch: Stopwatch = field(default_factory=lambda: Stopwatch(Silent()))
    _local: threading.local = field(default_factory=threading.local)

    def chunks(self, tensor: TensorMeta, dtype: str, *, multiple: int = 1, checked: bool = True) -> Iterator[Tensor]:
        """Flat chunks in `dtype` (safetensors code): about `chunk_bytes` as stored, a multiple of so many elements.

        Each is gone when the next comes. Raises `CheckpointError` naming the tensor when it holds NaN, infinity, or
        what becomes infinite in `dtype`, unless that is not `checked`.
        """
        for chunk in self._stored(tensor, multiple):
            values = chunk.to(torch_dtype(dtype))
            if checked:
                check_finite(values, chunk, tensor)
            yield values

    def read(self, tensor: TensorMeta, dtype: str, *, checked: bool = True) -> Tensor:
        """The whole tensor in its shape; otherwise as `chunks`."""
        stored = self.changed[tensor.name] if tensor.name in self.changed else self.checkpoint.read(tensor)
        values = stored.to(torch_dtype(dtype))
        if checked:
            check_finite(values, stored, tensor)
        return values

    def _stored(self, tensor: TensorMeta, multiple: int) -> Iterator[Tensor]:
        elements = max(1, self.chunk_bytes // ITEM_BYTES[tensor.dtype] // multiple) * multiple
        if tensor.name in self.changed:
            yield from self.changed[tensor.name].reshape(-1).split(elements)
            return
        # one buffer a thread: fresh memory would have to be zeroed, chunk after chunk
        if not hasattr(self._local, "buffer"):
            self._local.buffer = bytearray(self.chunk_bytes)
        chunks = self.checkpoint.chunks(tensor, elements, self._local.buffer)
        while True:
            with self.watch.working("read"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


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
    """What reports count it as: the quantisation's tag for all that a quantised weight is stored in, else torch's name
    of the dtype."""
    parameters: int
    """Logical parameters: of a quantised weight's tensors only the codes count any."""
    part_of: str | None = None
    """The quantised weight that it belongs to; reports count both as one tensor."""
    overhead: bool = False
    """Whether its bytes count as the file's, like a header: a JSON state."""
    variable: bool = False
    """Whether its length is known only once the data are: `shape` is the longest that it can be."""
    shared: bool = False
    """Whether it is one with another tensor in training, which counts its parameters: an adapter's copy of what is
    trained in the base itself, or of what is tied to another copy."""

    @property
    def nbytes(self) -> int:
        """Stored size in bytes; the largest possible for a variable one."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One unit of work: an operation and all that it writes, into one file."""

    operation: Operation
    outputs: tuple[OutputTensor, ...]
    encodes: bool = False
    """Whether the operation uses the quantisation's encoder."""
    in_turn: bool = False
    """Whether it follows the step before it: both draw from torch's one generator."""
    beside: Step | None = None
    """A step of another file that its operation carries out as well, into the same sink."""

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return sum(output.nbytes for output in self.outputs)


def cast_bytes(source: TensorMeta, dtype: str, chunk_bytes: int) -> int:
    """Bytes that a chunk takes beside itself: those of decoding it, and its copy where the dtype is another."""
    elements = min(chunk_bytes // ITEM_BYTES[source.dtype], source.parameters)
    return source.reading_bytes(elements) + (0 if source.dtype == dtype else elements * ITEM_BYTES[dtype])


def torch_dtype(code: str) -> torch.dtype:
    """torch's dtype of a safetensors code."""
    import torch

    return getattr(torch, TORCH_NAMES[code])
