"""A packed weight whose model holds it the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formats.interface import PackedTensor, Read

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Transposed(PackedTensor):
    """The decoded values of a matrix, transposed: one tile."""

    source: PackedTensor

    def reading_bytes(self, elements: int) -> int:
        """The source's values, and what decoding them allocates."""
        return self.nbytes + self.source.reading_bytes(self.parameters)

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode all of it."""
        decoded = self.source.values(0, self.parameters, read)
        return decoded.view(self.source.shape).T.flatten()


def transposed(source: PackedTensor) -> Transposed:
    """`source` (rows, columns) as (columns, rows)."""
    return Transposed(
        name=source.name, shape=source.shape[::-1], dtype=source.dtype, file=source.file, begin=source.begin,
        end=source.end, format=source.format, parts=source.parts, tag=source.tag, tile=source.parameters, source=source,
    )  # fmt: skip
