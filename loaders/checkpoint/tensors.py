"""One tensor of a checkpoint, and the dtypes of safetensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes an element takes, by safetensors dtype."""

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
}  # fmt: skip
"""torch's name of each safetensors dtype."""

DTYPE_CODES = {name: code for code, name in TORCH_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMeta:
    """One tensor of a checkpoint: what its values are, and where they are stored.

    A tensor that is not stored as it is, but packed in a format of `formats/`, is a `PackedTensor`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Of the values, as they are read; the safetensors code: `BF16`, `F32`, …"""
    file: str
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    strides: tuple[int, ...] | None = None
    """In elements; None where they lie one after another, as always in safetensors."""

    @property
    def parameters(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.parameters * ITEM_BYTES[self.dtype]

    @property
    def stored_in(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is made of: itself."""
        return (self,)

    @property
    def taken_from(self) -> tuple[TensorMeta, ...]:
        """The checkpoint's tensors that its values are taken from: itself, unless it is a part of one, or several."""
        return (self,)

    @property
    def stored_bytes(self) -> int:
        """Size of the data that it is stored in, as reports count it."""
        return self.nbytes

    @property
    def counted_as(self) -> str:
        """The dtype that reports count it under: torch's name, or the tag of a format."""
        return TORCH_NAMES[self.dtype]

    def reading_bytes(self, elements: int) -> int:
        """What reading so many elements at once allocates beside their values, in bytes."""
        return 0
