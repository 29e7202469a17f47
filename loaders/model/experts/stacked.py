"""What a fused parameter is made from: the stored matrices of single experts, read as the one tensor that they become.

transformers merges them on loading, all of a layer at once. Here they are read one after another, in the order in which
their values lie in the merged tensor, so that a layer's experts are never in memory together. The order is
transformers' own: its conversion is given a few numbers in the place of each matrix, and where they turn up tells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Protocol

from ...checkpoint.formats.interface import PackedTensor, Read, read_elements
from ...checkpoint.tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stored matrix, or one expert's of a stored stack."""

    source: TensorMeta
    begin: int
    """Its first element in `source`."""
    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def tile(self) -> int:
        """What of it is decoded together: all of it where that is cut otherwise."""
        tile = self.source.tile if isinstance(self.source, PackedTensor) else 1
        return self.count if self.begin % tile or self.count % tile else tile


@dataclass(frozen=True, kw_only=True)
class StackedExperts(PackedTensor):
    """Matrices whose values, one matrix after another, are those of a fused parameter."""

    pieces: tuple[Piece, ...]
    turned: bool
    """Whether rows become columns: each matrix is read whole."""

    @property
    def taken_from(self) -> tuple[TensorMeta, ...]:
        """The checkpoint's tensors that it is made of, each once."""
        taken = (stored for piece in self.pieces for stored in piece.source.taken_from)
        return tuple({stored.name: stored for stored in taken}.values())

    @cached_property
    def _stored_as_they_are(self) -> bool:
        """Whether their bytes, in a row, are those of the parameter."""
        plain = not any(isinstance(piece.source, PackedTensor) for piece in self.pieces)
        return plain and not self.turned and all(piece.source.dtype == self.dtype for piece in self.pieces)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(piece.count for piece in self.pieces))

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Read the pieces that lie there."""
        return self.chunk(begin, end, read, None)

    def chunk(self, begin: int, end: int, read: Read, buffer: bytearray | None) -> Tensor:
        """The same. Those that are stored as they are, one piece's after the other's, are read into the `buffer`."""
        import torch

        dtype, size = getattr(torch, TORCH_NAMES[self.dtype]), (end - begin) * ITEM_BYTES[self.dtype]
        view = memoryview(bytearray(size) if buffer is None or len(buffer) < size else buffer)[:size]
        values = torch.frombuffer(view, dtype=dtype)
        done, index = 0, bisect_right(self._ends, begin)
        while begin + done < end:
            piece, start = self.pieces[index], self._ends[index] - self.pieces[index].count
            first, last = begin + done - start, min(end - start, piece.count)
            place = values[done : done + last - first]
            if self._stored_as_they_are:
                room = view[done * place.itemsize : (done + place.numel()) * place.itemsize]
                found = read(piece.source, piece.begin + first, piece.begin + last, room)
            else:
                found = read_elements(piece.source, piece.begin + first, piece.begin + last, read)
            if self.turned:
                place.view(piece.columns, piece.rows).copy_(found.view(piece.rows, piece.columns).T)
            elif found.data_ptr() != place.data_ptr():
                place.copy_(found)
            done, index = done + place.numel(), index + 1
        return values

    def reading_bytes(self, elements: int) -> int:
        """A piece's values before they are put in their place, and what decodes them."""
        if self._stored_as_they_are:
            return 0
        most = [min(max(elements, self.tile), piece.count) for piece in self.pieces]
        return max(
            number * ITEM_BYTES[piece.source.dtype] + piece.source.reading_bytes(number)
            for piece, number in zip(self.pieces, most, strict=True)
        )


class Merging(Protocol):
    """How transformers merges tensors on loading."""

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored names to values, then parameter names to values."""
        ...


_ROWS, _COLUMNS = 4, 6
"""Of what stands for a matrix: both orientations differ, and interleaved halves are told from those that are not."""


def stack_experts(
    parameter: str, shape: tuple[int, int, int], sources: Sequence[TensorMeta], merging: Merging
) -> StackedExperts | None:
    """What becomes the fused `parameter` of `shape`; None where its values are not those of whole matrices in a row.

    `sources` are single matrices, or stacks of as many as there are experts.
    """
    found = _find_order(parameter, shape[0], sources, merging)
    if found is None:
        return None
    order, turned = found
    pieces = tuple(_piece(sources[index], expert) for index, expert in order)
    width = shape[2]
    if sum(piece.count for piece in pieces) != prod(shape):
        return None
    # a smaller last block of FP8, or a matrix that is not as wide, would shift all that follows
    if any((piece.rows if turned else piece.columns) != width for piece in pieces):
        return None
    dtypes = {source.dtype for source in sources}
    first = pieces[0].source
    tiles = {piece.count if turned else piece.tile for piece in pieces}
    if turned and len(tiles) > 1:
        return None
    return StackedExperts(
        name=parameter, shape=shape, dtype=dtypes.pop() if len(dtypes) == 1 else "F32", file=first.file,
        begin=first.begin, end=first.end, format=first.format if isinstance(first, PackedTensor) else None,
        parts=tuple(part for source in sources for part in source.stored_in), tag=first.counted_as,
        tile=max(tiles), pieces=pieces, turned=turned,
    )  # fmt: skip


def _piece(source: TensorMeta, expert: int | None) -> Piece:
    rows, columns = source.shape[-2:]
    return Piece(source=source, begin=(expert or 0) * rows * columns, rows=rows, columns=columns)


def _find_order(
    parameter: str, experts: int, sources: Sequence[TensorMeta], merging: Merging
) -> tuple[list[tuple[int, int | None]], bool] | None:
    """Which matrices follow one another, by the index of their source and their place in it, and whether turned."""
    import torch

    size = _ROWS * _COLUMNS
    numbers, matrices = [], []
    for index, source in enumerate(sources):
        stacked = len(source.shape) == 3
        if len(source.shape) != 2 and not (stacked and source.shape[0] == experts):
            return None
        count = experts if stacked else 1
        first = len(matrices) * size
        values = torch.arange(first, first + count * size, dtype=torch.float64).reshape(count, _ROWS, _COLUMNS)
        numbers.append(values if stacked else values[0])
        matrices += [(index, expert if stacked else None) for expert in range(count)]
    try:
        loaded = merging.load({source.name: value for source, value in zip(sources, numbers, strict=True)})
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError):
        return None  # it takes matrices of certain sizes alone
    whole = loaded.get(parameter)
    if len(loaded) != 1 or whole is None or whole.numel() != len(matrices) * size:
        return None
    blocks = whole.reshape(-1, size)
    order = (blocks[:, 0] / size).tolist()
    expected = torch.arange(size, dtype=torch.float64).reshape(_ROWS, _COLUMNS)
    for turned in (False, True):
        inner = (expected.T if turned else expected).reshape(-1)
        if (blocks - blocks[:, :1] == inner).all() and sorted(order) == list(range(len(matrices))):
            return [matrices[int(number)] for number in order], turned
    return None
