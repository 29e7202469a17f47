"""Tensors of GGUF files: rows of blocks, in any of ggml's types, decoded while they are read.

A row is whole blocks, one after another (https://github.com/ggml-org/ggml, docs/gguf.md); what they hold is decoded by
the `gguf` package, or by transformers where it does so itself. llama.cpp's names, and the order in which it writes
rows, are not the model's: which rows of which stored tensors make up a tensor of the model is found in `model/gguf.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from ..tensors import TensorMeta
from .interface import Headers, PackedTensor, Read

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..gguf_header import GgufTensor

Decode = Callable[["Tensor", str], "Tensor"]
"""Whole blocks (uint8, flat) and their type, to their values: flat, float32, or already in bfloat16."""
_PIECE = 128 * 1024
"""Elements that are decoded at a time: what decoding makes on the way stays in the processor's cache."""
_DECODING_BYTES = 28
"""What the libraries take for an element on the way, at most: float32, and the integers of several steps."""
_GATHERING_BYTES = 160
"""What finding rows takes for each, where they are in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks(TensorMeta):
    """A stored tensor, as the bytes that it is."""

    dimensions: tuple[int, ...]
    """In torch's order; what it holds is in `shape`, in bytes."""
    ggml_type: str

    @property
    def rows(self) -> int:
        """The number of rows: one of a vector."""
        return prod(self.dimensions[:-1])

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.dimensions[-1]

    @property
    def row_bytes(self) -> int:
        """What a row takes in the file."""
        return self.nbytes // self.rows


def stored_blocks(tensor: GgufTensor, file: str) -> Blocks:
    """A tensor of a GGUF header as one that can be read."""
    return Blocks(
        name=tensor.name, shape=(tensor.nbytes,), dtype="U8", file=file, begin=tensor.begin,
        end=tensor.begin + tensor.nbytes, dimensions=tensor.shape or (1,), ggml_type=tensor.dtype,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Order:
    """Which stored rows a tensor consists of."""

    rows: range | np.ndarray
    """The rows of all parts, counted on from one part to the next."""
    columns: np.ndarray | None = None
    """The columns of each row, where they are in another order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GgufWeight(PackedTensor):
    """A tensor of the model that is made from stored ones: of some of their rows, or in another way."""

    parts: tuple[Blocks, ...]
    decode: Decode = field(repr=False)
    order: Order | None
    """None where it is no matter of rows."""
    transform: Callable[[Mapping[str, Tensor]], Tensor] | None = field(default=None, repr=False)
    """Makes it from all values of its parts, by their names and in their shapes, where `order` does not say how."""

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode as `from_pretrained` does: in float32 or bfloat16, by the type and the library; then to bfloat16."""
        import torch

        if self.order is None:
            assert self.transform is not None
            whole = {part.name: self._whole(part, read) for part in self.parts}
            return self.transform(whole).to(torch.bfloat16).reshape(-1)[begin:end]
        columns = self.parts[0].columns
        values = torch.empty((end - begin) // columns, columns, dtype=torch.bfloat16)
        for part, first, places in self._runs(self.order.rows[begin // columns : end // columns]):
            for at, piece in self._pieces(part, first, first + len(places), read):
                where = places[at : at + len(piece)]
                if self.order.columns is not None:
                    piece = piece[:, self.order.columns]
                if isinstance(where, range):
                    values[where.start : where.stop] = piece
                else:
                    values[torch.from_numpy(where)] = piece.to(torch.bfloat16)
        return values.reshape(-1)

    def reading_bytes(self, elements: int) -> int:
        """A piece on its way; where a tensor is made as a whole, its parts and what they become, in float32."""
        columns = self.parts[0].columns
        if self.order is None:
            stored = sum(part.rows * part.columns for part in self.parts)
            return min(max(_PIECE, columns), stored) * _DECODING_BYTES + 3 * 4 * stored
        rows = max(1, min(elements, self.parameters) // columns)
        gathering = 0 if isinstance(self.order.rows, range) else _GATHERING_BYTES
        return min(max(_PIECE, columns), rows * columns) * _DECODING_BYTES + rows * gathering

    def _runs(self, rows: range | np.ndarray) -> Iterator[tuple[Blocks, int, range | np.ndarray]]:
        """Rows that lie one after another in the file: the part, its first such row, and their places in the result."""
        import numpy as np

        before = 0
        for part in self.parts:
            end = before + part.rows
            if isinstance(rows, range):
                inside = range(max(rows.start, before), min(rows.stop, end))
                if inside:
                    yield part, inside.start - before, range(inside.start - rows.start, inside.stop - rows.start)
            else:
                (places,) = np.nonzero((rows >= before) & (rows < end))
                places = places[np.argsort(rows[places], kind="stable")]
                for run in np.split(places, np.nonzero(np.diff(rows[places]) != 1)[0] + 1) if len(places) else ():
                    yield part, int(rows[run[0]]) - before, run
            before = end

    def _pieces(self, part: Blocks, first: int, last: int, read: Read) -> Iterator[tuple[int, Tensor]]:
        """The rows from `first` to `last` (exclusive), decoded a few at a time; the number is counted from `first`."""
        step = max(1, _PIECE // part.columns)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            blocks = read(part, begin * part.row_bytes, end * part.row_bytes)
            yield begin - first, self.decode(blocks, part.ggml_type).reshape(end - begin, part.columns)

    def _whole(self, part: Blocks, read: Read) -> Tensor:
        import torch

        whole = None
        for at, piece in self._pieces(part, 0, part.rows, read):
            if whole is None:
                whole = torch.empty(part.rows, part.columns, dtype=piece.dtype)
            whole[at : at + len(piece)] = piece
        assert whole is not None
        return whole.reshape(part.dimensions)

    @property
    def stored_bytes(self) -> int:
        """Size of the rows that it is stored in."""
        if self.order is None:
            return sum(part.nbytes for part in self.parts)
        return self.parameters * self.parts[0].row_bytes // self.parts[0].columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Gguf:
    """All of ggml's types that the `gguf` package decodes."""

    name: str = "GGUF"
    method: str = "gguf"
    kind: str = "GGUF"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[PackedTensor]:
        """None: no safetensors file holds them."""
        return iter(())

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """A GGUF file has no config.json, and so no `quantization_config`."""
        return found and not section

    def kept_settings(self, section: Mapping[str, Any]) -> None:
        """Nothing: all is decoded."""
        return


def decode_blocks(blocks: Tensor, ggml_type: str) -> Tensor:
    """Decode with the `gguf` package: flat, float32. Raises `NotImplementedError` for a type that it can't decode."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[ggml_type])).reshape(-1)
