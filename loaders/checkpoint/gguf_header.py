"""The header of a GGUF file: its metadata and where every tensor lies, without reading one.

Little-endian throughout: `GGUF`, version (uint32), counts of tensors and of key-value pairs (uint64), the pairs (key,
type, value), a record for each tensor (name, dimensions, type, offset), padding, the data. Strings are a uint64 length
and UTF-8; arrays a type, a uint64 count and the items (https://github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, SourceError

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""Four times the largest vocabulary with its merges; a file's header is read one string at a time."""
MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_VERSIONS = (2, 3)

GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""A tensor's type: its name, the elements of a block, and the bytes that a block takes."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""A value's type as `struct` spells it."""


_STRING, _ARRAY = 8, 9
_MOST_NUMBERS = 4096
"""Of an array that is kept: there may be one for each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    """In torch's order, the slowest dimension first; GGUF writes it the other way round."""
    dtype: str
    begin: int
    """First byte, counted from the start of the file."""
    nbytes: int

    @property
    def parameters(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    metadata: Mapping[str, Any]
    """Arrays are lists; long ones of numbers, such as a token's scores, are their lengths, as `int`."""
    tensors: tuple[GgufTensor, ...]


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of the file at `path`.

    Raises `CheckpointError` for what is not a whole GGUF file of version 2 or 3, `SourceError` where it can't be read.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return _Reader(file, min(size, MAX_HEADER_BYTES), str(path)).header(size)
    except OSError as error:
        raise SourceError(f"can't read `{path}`: {error.strerror or error}") from error


class _Reader:
    """Reads values one after another, never beyond `end`."""

    def __init__(self, file: BinaryIO, end: int, name: str) -> None:
        self._file = file
        self._left = end
        self._name = name

    def header(self, size: int) -> GgufHeader:
        magic = self._take(4)
        if magic != b"GGUF":
            raise self._malformed("does not begin with `GGUF`")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise self._malformed(f"is of version {version}, where 2 and 3 are known")
        tensor_count, pair_count = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        records = [self._record() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment < 2**32:
            raise self._malformed(f"has the alignment `{alignment}`")
        if len({name for name, *_ in records}) != len(records):
            raise self._malformed("names a tensor twice")
        begin = -(-self._file.tell() // alignment) * alignment
        return GgufHeader(metadata=metadata, tensors=tuple(self._tensor(*record, begin, size) for record in records))

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        count = self._scalar("I")
        if count > MAX_DIMENSIONS:
            raise self._malformed(f"gives tensor `{name}` {count} dimensions")
        dimensions = tuple(self._scalar("Q") for _ in range(count))
        return name, dimensions[::-1], self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, offset: int, begin: int, size: int) -> GgufTensor:
        if code not in GGML_TYPES:
            raise self._malformed(f"gives tensor `{name}` the type {code}, which ftload does not know")
        dtype, block, block_bytes = GGML_TYPES[code]
        if (shape[-1] if shape else 1) % block:
            raise self._malformed(f"gives tensor `{name}` rows of {shape[-1]} elements in blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if begin + offset + nbytes > size:
            raise CheckpointError(
                f"`{self._name}` is truncated: tensor `{name}` ends at byte {begin + offset + nbytes}, the file has "
                f"{size}",
                hint="the file is incomplete: download it again",
            )
        return GgufTensor(name=name, shape=shape, dtype=dtype, begin=begin + offset, nbytes=nbytes)

    def _value(self, code: int) -> Any:
        if code in _SCALARS:
            return self._scalar(_SCALARS[code])
        if code == _STRING:
            return self._string()
        if code != _ARRAY:
            raise self._malformed(f"has a value of type {code}")
        item, count = self._scalar("I"), self._scalar("Q")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item not in _SCALARS:  # arrays of arrays: allowed by the format, used by nobody
            raise self._malformed(f"has an array of type {item}")
        if count > _MOST_NUMBERS:
            self._skip(count * struct.calcsize(_SCALARS[item]))
            return count
        return [self._scalar(_SCALARS[item]) for _ in range(count)]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        self._count(count)
        data = self._file.read(count)
        if len(data) != count:
            raise self._malformed("ends within its header")
        return data

    def _skip(self, count: int) -> None:
        self._count(count)
        self._file.seek(count, 1)

    def _count(self, count: int) -> None:
        # before anything is read: a length of gigabytes costs nothing
        self._left -= count
        if self._left < 0:
            raise self._malformed("ends within its header, or the header is too large")

    def _malformed(self, problem: str) -> CheckpointError:
        return CheckpointError(f"`{self._name}` {problem}", hint="is it a whole GGUF file?")
