"""Headers of GGUF files for transformers, read by ftload's own reader while it derives a configuration.

The `gguf` package's makes arrays of each of the vocabulary's strings: seconds, or tens of them, each time it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint.gguf_header import GgufTensor, read_gguf_header

_STRING, _ARRAY = 8, 9
_TYPES = {bool: 7, int: 11, float: 12, str: _STRING}
"""A value's type in the file, or one that is read alike."""
_TOKENS = "tokenizer.ggml.tokens"


class Field(NamedTuple):
    """A key and its value, as `gguf.gguf_reader.ReaderField` has them."""

    name: str
    parts: list[Any]
    data: list[int]
    types: list[int]


class HeaderReader:
    """What transformers uses of a `gguf.GGUFReader` when it wants no tensor's values.

    Of the vocabulary there is the number of tokens alone: what they are, transformers reads in another way.
    """

    def __init__(self, path: str) -> None:
        header = read_gguf_header(Path(path))
        self.tensors: tuple[GgufTensor, ...] = header.tensors
        self.fields = {key: _field(key, value) for key, value in header.metadata.items() if _is_wanted(key, value)}


def _is_wanted(key: str, value: Any) -> bool:
    return key == _TOKENS or not (isinstance(value, list) and value and isinstance(value[0], str))


def _field(key: str, value: Any) -> Field:
    before: list[Any] = [[len(key)], key.encode(), [_ARRAY]]
    if not isinstance(value, list):
        kind = _TYPES[type(value)]
        return Field(name=key, parts=[*before, _part(value)], data=[len(before)], types=[kind])
    if key == _TOKENS:
        return Field(name=key, parts=[*before, b""], data=[len(before)] * len(value), types=[_ARRAY, _STRING])
    parts = [*before, *map(_part, value)]
    types = [_ARRAY, *(_TYPES[type(item)] for item in value[:1])]
    return Field(name=key, parts=parts, data=list(range(len(before), len(parts))), types=types)


def _part(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else [value]


@contextmanager
def quick_gguf_reader() -> Iterator[None]:
    """Have transformers use `HeaderReader`; without the `gguf` package, there is nothing to change."""
    try:
        import gguf
    except ImportError:
        yield
        return
    usual = gguf.GGUFReader
    gguf.GGUFReader = HeaderReader
    try:
        yield
    finally:
        gguf.GGUFReader = usual
