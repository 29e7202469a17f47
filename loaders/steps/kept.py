"""A sink that keeps what is written: for an operation that needs what another one makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .step import OutputTensor, Sink, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Kept:
    """Keeps tensors in memory, and hands them on to another sink where there is one."""

    def __init__(self, outputs: Iterable[OutputTensor], beyond: Sink | None = None) -> None:
        import torch

        self._outputs = {output.name: output for output in outputs}
        self._values = {
            name: torch.empty(output.shape, dtype=torch_dtype(output.dtype)) for name, output in self._outputs.items()
        }
        self._done = dict.fromkeys(self._outputs, 0)
        self._beyond = beyond

    def write(self, name: str, values: Tensor) -> None:
        """Append `values`, of any shape and of as many bytes, to the tensor `name`."""
        import torch

        kept = self._values[name].reshape(-1).view(torch.uint8)
        data = values.detach().contiguous().reshape(-1).view(torch.uint8)
        done = self._done[name]
        kept[done : done + data.numel()] = data
        self._done[name] = done + data.numel()
        if self._beyond is not None:
            self._beyond.write(name, values)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name`; one of variable length as long as it came out, as bytes."""
        import torch

        values = self._values[name]
        return values.reshape(-1).view(torch.uint8)[: self._done[name]] if self._outputs[name].variable else values
