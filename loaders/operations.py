"""How the tensors of an output file are made: a few kinds of work, each for one piece of a model at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd, prod, sqrt
from typing import TYPE_CHECKING, Any, Protocol

from . import nf4
from .catalog import Component, LinearLayer
from .checkpoint import ITEM_BYTES, TORCH_NAMES, Checkpoint, TensorMeta, rows_per_chunk
from .errors import CheckpointError
from .skeleton import Conversion, ModelTensor

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
    """What operations read."""

    checkpoint: Checkpoint
    new_rows: Mapping[str, Tensor] = field(default_factory=dict)
    """Rows for grown embeddings, by output name, where they were drawn beforehand."""


class Operation(Protocol):
    """Makes one or more output tensors. Holds one chunk in memory, or one tensor where it must."""

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
    trainable: bool = False
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

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read, cast and write chunk by chunk."""
        for chunk in inputs.checkpoint.chunks(self.source, _rows(self.source)):
            sink.write(self.name, chunk.to(_torch_dtype(self.dtype)))


@dataclass(frozen=True, kw_only=True, eq=False)
class All:
    """Several operations, one after another."""

    operations: tuple[Operation, ...]

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Run each."""
        for operation in self.operations:
            operation.run(inputs, sink)


@dataclass(frozen=True, kw_only=True, eq=False)
class Grow:
    """Copy an embedding or head (rows × …) and append rows: those drawn beforehand, else the mean of the old ones."""

    source: TensorMeta
    name: str
    parameter: str
    """The model's name for it."""
    dtype: str
    new_rows: int

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """One pass; the mean is accumulated in float64, row after row, so that it is the same on every machine."""
        import torch

        total: Any = 0.0
        for chunk in inputs.checkpoint.chunks(self.source, _rows(self.source)):
            values = chunk.to(_torch_dtype(self.dtype))
            sink.write(self.name, values)
            # numpy adds along the first axis in order, whatever the number of threads
            partial = values.to(torch.float32).numpy().sum(axis=0, dtype="float64")
            total = total + partial
        if self.name in inputs.new_rows:
            rows = inputs.new_rows[self.name]
        else:
            mean = torch.as_tensor(total / self.source.shape[0])
            rows = mean.to(torch.float32).to(_torch_dtype(self.dtype)).expand(self.new_rows, *mean.shape)
        sink.write(self.name, rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize:
    """Encode a weight as NF4 with double quantisation."""

    source: TensorMeta
    name: str
    transposed: bool
    """GPT-2's Conv1D stores (in, out); bitsandbytes wants (out, in)."""

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Encode chunk by chunk; the blocks' maxima (n/64 float32) are held until the end.

        Raises `CheckpointError` naming the tensor when it holds NaN or infinity.
        """
        import torch

        shape = self.source.shape
        rows = shape[0] if self.transposed else _rows(self.source, multiple=nf4.BLOCK)
        maxima = []
        for chunk in inputs.checkpoint.chunks(self.source, rows):
            values = chunk.to(torch.bfloat16)
            try:
                codes, absmax = nf4.encode(values.T if self.transposed else values)
            except ValueError as error:
                raise CheckpointError(
                    f"tensor `{self.source.name}` of `{self.source.file}` holds {error}",
                    hint="it can't be quantised; the checkpoint is damaged or was saved from a diverged run",
                ) from error
            sink.write(self.name, codes)
            maxima.append(absmax)
        logical = shape[::-1] if self.transposed else shape
        for suffix, value in nf4.compress_statistics(torch.cat(maxima), logical).items():
            sink.write(self.name + suffix, value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Convert:
    """Tensors that transformers merges or splits: all of one conversion are held at once."""

    conversion: Conversion
    sources: tuple[TensorMeta, ...]
    dtype: str

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read, cast as the loader would, convert, and write what comes out."""
        dtype = _torch_dtype(self.dtype)
        values = {meta.name: inputs.checkpoint.read(meta).to(dtype) for meta in self.sources}
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

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Draw A and write both."""
        import torch

        a = torch.nn.Linear(self.layer.in_features, self.rank, bias=False)
        b = torch.nn.Linear(self.rank, self.layer.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(a.weight, a=sqrt(5))
        weight = a.weight.detach().to(_torch_dtype(self.rounded_to)).to(torch.float32)
        sink.write(self.names[0], weight)
        sink.write(self.names[1], torch.zeros_like(b.weight))


def _rows(tensor: TensorMeta, *, multiple: int = 1) -> int:
    """Rows per chunk, so many that their elements are a multiple of `multiple`."""
    rows = rows_per_chunk(tensor.shape, ITEM_BYTES[tensor.dtype])
    row = max(1, tensor.parameters // max(1, tensor.shape[0])) if tensor.shape else 1
    step = multiple // gcd(row, multiple)
    return max(step, rows // step * step)


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
        parameters=0 if tensor.buffer else prod(tensor.shape),
    )
