"""Tensors that are stored as they are: elements in a file, one after another or scattered, or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..source.source import Source
from .tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PlainReader:
    """Reads stored tensors."""

    source: Source
    loaded: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Tensors of `.bin` files that could not be read at their places, and are in memory."""

    def values(self, tensor: TensorMeta, begin: int, end: int, buffer: memoryview | None = None) -> Tensor:
        """The elements from `begin` to `end` (exclusive), flat, in the stored dtype.

        They lie in the `buffer`, which takes just as many, where there is one and they are not scattered or in memory.
        Of a file that was not fetched from a hub only these bytes travel.
        """
        import torch

        if tensor.name in self.loaded:
            return self.loaded[tensor.name].reshape(-1).view(getattr(torch, TORCH_NAMES[tensor.dtype]))[begin:end]
        dtype, size = getattr(torch, TORCH_NAMES[tensor.dtype]), ITEM_BYTES[tensor.dtype]
        if begin >= end:
            return torch.empty(0, dtype=dtype)
        if tensor.strides is not None:
            return self._span(tensor)[_scattered(tensor.shape, tensor.strides, begin, end)]
        if buffer is None:
            buffer = memoryview(bytearray((end - begin) * size))
        self.source.read_into(buffer, tensor.file, tensor.begin + begin * size)
        return torch.frombuffer(buffer, dtype=dtype)

    def chunks(self, tensor: TensorMeta, elements: int, buffer: bytearray | None = None) -> Iterator[Tensor]:
        """The elements in order, flat, at most `elements` at a time; see `Checkpoint.chunks`."""
        import torch

        if tensor.name in self.loaded:
            yield from self.loaded[tensor.name].reshape(-1).split(elements)
            return
        if tensor.strides is not None:
            span = self._span(tensor)
            for begin in range(0, tensor.parameters, elements):
                end = min(begin + elements, tensor.parameters)
                yield span[_scattered(tensor.shape, tensor.strides, begin, end)]
            return
        dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
        size = elements * ITEM_BYTES[tensor.dtype]
        with self.source.opened(tensor.file) as read:
            for begin in range(tensor.begin, tensor.end, size):
                count = min(size, tensor.end - begin)
                if buffer is None or len(buffer) < count:
                    view = memoryview(bytearray(count))
                else:
                    view = memoryview(buffer)[:count]
                read(view, begin)
                yield torch.frombuffer(view, dtype=dtype)

    def _span(self, tensor: TensorMeta) -> Tensor:
        """All bytes that a tensor with strides lies in, as elements."""
        count = (tensor.end - tensor.begin) // ITEM_BYTES[tensor.dtype]
        (span,) = self.chunks(replace(tensor, shape=(count,), strides=None), count)
        return span


def _scattered(shape: tuple[int, ...], strides: tuple[int, ...], begin: int, end: int) -> Tensor:
    """Where in their span the elements from `begin` to `end` lie."""
    import torch

    rest = torch.arange(begin, end)
    index = torch.zeros_like(rest)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        index += rest % size * stride
        rest //= size
    return index
