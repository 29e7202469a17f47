"""Tensors of the base, for an adapter whose initial values come from them: read as the base is written, not twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..model.tensor_map import ModelTensor
from ..steps.kept import Kept
from ..steps.plain import plain_step
from ..steps.step import Inputs, OutputTensor, Sink, Step, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseTensor:
    """A parameter of the base, and how it comes to be."""

    parameter: str
    group: tuple[ModelTensor, ...]
    """What is written together with it: it alone, or all that come out of one conversion."""
    step: Step
    """By which the strategy writes the group."""
    is_quantised: bool

    @property
    def alone(self) -> ModelTensor | None:
        """What it is in the base; None where it goes through a conversion."""
        (tensor, *_) = self.group
        return tensor if tensor.conversion is None else None

    @property
    def fixed(self) -> str | None:
        """Why an adapter can't change it; None where it can."""
        if self.alone is None:
            return f"is merged with other tensors when it is loaded (`{self.group[0].sources[0].name}`)"
        if self.alone.packed is not None:
            # in PEFT's words
            return "is 4-bit already: please initialize under float32, float16, or bfloat16"
        return None

    @property
    def nbytes(self) -> int:
        """Of all that is read for it, once it is loaded without quantisation."""
        return sum(output.nbytes for output in plain_step(self.group).outputs)

    def memory(self, chunk_bytes: int) -> int:
        """What reading it takes, itself included."""
        return self.nbytes * (1 if self.alone is not None else 3) + self.step.operation.memory(chunk_bytes)

    def read(self, inputs: Inputs) -> Tensor:
        """Its value as it is loaded without quantisation, in the shape that the model has it in."""
        if self.alone is None:
            (tensor, *_) = self.group
            assert tensor.conversion is not None
            values = {source.name: inputs.read(source, tensor.dtype) for source in tensor.sources}
            return tensor.conversion.load(values)[self.parameter]
        step = plain_step(self.group)
        kept = Kept(step.outputs)
        step.operation.run(inputs, kept)
        return kept[self.alone.name]

    def write(self, inputs: Inputs, sink: Sink | None) -> Mapping[str, Tensor]:
        """Carry out its step; returns what it writes, by what follows the parameter's name: nothing for a plain one."""
        assert self.alone is not None
        kept = Kept(self.step.outputs, sink)
        self.step.operation.run(inputs, kept)
        return {output.name.removeprefix(self.alone.name): kept[output.name] for output in self.step.outputs}

    def write_changed(self, value: Tensor, inputs: Inputs, sink: Sink) -> None:
        """Carry out its step with `value`, which is in the shape that the model has it in, in its place."""
        assert self.alone is not None
        (source,) = self.alone.sources
        self.step.operation.run(replace(inputs, changed={source.name: value}), sink)


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyOfBase:
    """Copy a parameter of the base, or some of its rows, into the adapter: what is trained of the base itself."""

    base: BaseTensor
    output: OutputTensor
    rows: tuple[int, ...] | None = None
    """None for all of them."""

    def memory(self, chunk_bytes: int) -> int:
        """What the base's own step takes, a chunk in another dtype and the rows; all of it after a conversion."""
        if self.base.alone is None:
            return self.base.memory(chunk_bytes)
        return self.base.step.operation.memory(chunk_bytes) + 2 * chunk_bytes + (self.output.nbytes if self.rows else 0)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read and write chunk by chunk."""
        copied = _Copied(self, sink)
        if self.base.alone is None:
            copied.write(self.output.name, self.base.read(inputs))
        else:
            self.base.step.operation.run(inputs, copied)
        copied.finish()


class _Copied:
    """A sink for the base's tensor: passes it on under another name, or those of its rows that are wanted."""

    def __init__(self, copy: CopyOfBase, sink: Sink) -> None:
        import torch

        self._rows, self._name, self._sink = copy.rows, copy.output.name, sink
        self._dtype = torch_dtype(copy.output.dtype)
        self._row = copy.output.shape[-1]
        self._begin = 0
        self._found = torch.empty(copy.output.shape if copy.rows else (0,), dtype=self._dtype)

    def write(self, name: str, values: Tensor) -> None:
        """Take the next elements."""
        if self._rows is None:
            self._sink.write(self._name, values.to(self._dtype))
            return
        flat = values.reshape(-1)
        for place, row in enumerate(self._rows):
            # a chunk may end within a row
            begin, end = row * self._row - self._begin, (row + 1) * self._row - self._begin
            first, last = max(begin, 0), min(end, flat.numel())
            if first < last:
                self._found[place, first - begin : last - begin] = flat[first:last].to(self._dtype)
        self._begin += flat.numel()

    def finish(self) -> None:
        """Write the rows."""
        if self._rows is not None:
            self._sink.write(self._name, self._found)
