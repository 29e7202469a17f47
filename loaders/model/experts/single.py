"""Single experts of a stored stack: 4-bit experts are stored fused, and are saved one by one when they are decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ...checkpoint.formats.interface import PackedTensor, Read, read_elements
from ...checkpoint.tensors import ITEM_BYTES, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleExpert(PackedTensor):
    """A matrix of a stack: values of the stored tensor that follow one another."""

    source: TensorMeta
    first: int
    """Where they begin there, in elements."""

    @property
    def taken_from(self) -> tuple[TensorMeta, ...]:
        """The stack."""
        return (self.source,)

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Read them there: in whole tiles of the stack, which may begin before them and end after them."""
        return read_elements(self.source, self.first + begin, self.first + end, read)

    def reading_bytes(self, elements: int) -> int:
        """What reading the stack takes, and the values of two tiles of it more."""
        more = min(elements + 2 * self.tile, self.source.parameters)
        return (more - min(elements, more)) * ITEM_BYTES[self.dtype] + self.source.reading_bytes(more)


_ROWS, _COLUMNS = 12, 5
"""Of what stands for a matrix: halves, thirds and quarters of it are whole rows."""


def single_experts(
    source: TensorMeta, shape: tuple[int, ...], parameter: str, divide: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> list[SingleExpert] | None:
    """What saving makes of a stack of `shape` (experts, rows, columns): matrices, by the names that they are saved by.

    `divide` is transformers' own, from the values of parameters to those of what is saved. It is given a few numbers in
    the place of each matrix: where they turn up tells. None where it does not cut a stack between rows.
    """
    import torch

    if len(shape) != 3 or source.shape != shape:
        return None
    few, all_of_them = shape[0] * _ROWS * _COLUMNS, prod(shape)
    numbers = torch.arange(few).reshape(shape[0], _ROWS, _COLUMNS)
    try:
        places = divide({parameter: numbers})
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError):
        return None  # it takes matrices of certain sizes alone
    saved = divide({parameter: torch.empty(shape, device="meta")})
    if sum(value.numel() for value in saved.values()) != all_of_them:
        return None
    packed = source if isinstance(source, PackedTensor) else None
    found = []
    for name, place in places.items():
        begin, count, values = int(place.flatten()[0]), place.numel(), saved[name]
        in_a_row = place.flatten().equal(torch.arange(begin, begin + count))
        # as many of the few as there are values of all, in whole numbers
        if not in_a_row or count * all_of_them != values.numel() * few or begin * all_of_them % few:
            return None
        found.append(
            SingleExpert(
                name=name, shape=tuple(values.shape), dtype=source.dtype, file=source.file, begin=source.begin,
                end=source.end, format=packed.format if packed else None, parts=source.stored_in,
                tag=source.counted_as, tile=packed.tile if packed else 1, source=source,
                first=begin * all_of_them // few,
            )
        )  # fmt: skip
    return found
