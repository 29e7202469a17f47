"""What a stored format answers, and the values that cross the seam.

A checkpoint holds *logical* tensors, which the model knows, in *stored* ones, which the headers list. Most are stored
as they are. Of the others, a format says which stored tensors make up a logical one, and decodes its values while they
are read: whoever copies, casts, quantises or grows a tensor knows nothing of formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import MissingRequirementError, said_by
from ...source.source import Source
from ..json_files import read_json
from ..tensors import TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


class Read(Protocol):
    """Reads stored tensors."""

    def __call__(self, tensor: TensorMeta, begin: int, end: int, buffer: memoryview | None = None, /) -> Tensor:
        """The elements from `begin` to `end` (exclusive), flat, in the stored dtype.

        They may lie in the `buffer`, which takes just as many bytes.
        """
        ...


_REQUESTS = 16
"""Ranges that are asked of a hub at a time."""


@dataclass(frozen=True, kw_only=True)
class Headers:
    """What a format finds its tensors in."""

    source: Source
    tensors: Mapping[str, TensorMeta]
    """The stored tensors, by name."""
    dequantize: bool = False
    """Whether to decode what transformers would load packed."""

    @cached_property
    def section(self) -> Mapping[str, Any]:
        """config.json's `quantization_config`, that of a multimodal model's language model too; empty without one."""
        if not any(file.path == "config.json" for file in self.source.files):
            return {}
        config = read_json(self.source, "config.json")
        text = config.get("text_config")
        sections = [part.get("quantization_config") for part in (config, text) if isinstance(part, dict)]
        return next((section for section in sections if isinstance(section, dict)), {})

    def read(self, tensors: Sequence[TensorMeta]) -> list[bytes]:
        """The bytes of small tensors, in their order; of a hub, many are asked for at once."""

        def read_one(tensor: TensorMeta) -> bytes:
            return self.source.read(tensor.file, tensor.begin, tensor.end)

        if self.source.kind != "hub":
            return [read_one(tensor) for tensor in tensors]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(read_one, tensors))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor(TensorMeta, ABC):
    """A logical tensor that is decoded from stored ones.

    `shape` is the logical shape, `dtype` that of the decoded values; `file`, `begin` and `end` are its first part's.
    Each format has a subclass with what it needs to decode.
    """

    format: StoredFormat | None
    """None where it is in none: a tensor that is stored as it is, and changed when it is read."""
    parts: tuple[TensorMeta, ...]
    """The stored tensors that it is made of, the one with the weights first."""
    tag: str
    """The dtype that reports count it under."""
    tile: int
    """Elements that are decoded together; the last ones may be fewer."""
    stays_packed: bool = False
    """Whether transformers loads it without decoding it, so that training can start from it as it is.

    Everything else of the checkpoint is then loaded in the dtype that it is stored in.
    """
    as_linear: bool = False
    """Whether even the weight of a `Conv1D` (in, out) is stored as that of a linear layer (out, in)."""

    @abstractmethod
    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode the elements from `begin` to `end` (exclusive): flat, in `dtype`.

        `begin` is a multiple of `tile`, and so is `end` unless it is the last of all.
        """

    def chunk(self, begin: int, end: int, read: Read, buffer: bytearray | None) -> Tensor:
        """As `values`; they may lie in the `buffer`, as getting fresh memory can take longer than decoding."""
        return self.values(begin, end, read)

    def part(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode any elements, from `begin` to `end` (exclusive): they are cut out of whole tiles."""
        first = begin // self.tile * self.tile
        last = min(-(-end // self.tile) * self.tile, self.parameters)
        return self.values(first, last, read)[begin - first : end - first]

    @abstractmethod
    def reading_bytes(self, elements: int) -> int:
        """What decoding so many elements at once allocates beside their values, in bytes."""

    def problems(self, read: Read) -> Iterator[str]:
        """What is stored and can't have come from encoding a weight; its files lie on this machine."""
        return iter(())

    @property
    def stored_in(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is made of."""
        return self.parts

    @property
    def stored_bytes(self) -> int:
        """Size of the data that it is stored in, as reports count it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def counted_as(self) -> str:
        """The dtype that reports count it under: the format's tag."""
        return self.tag


def read_elements(tensor: TensorMeta, begin: int, end: int, read: Read) -> Tensor:
    """The elements from `begin` to `end` (exclusive) of any tensor, flat, decoded where they are packed."""
    return tensor.part(begin, end, read) if isinstance(tensor, PackedTensor) else read(tensor, begin, end)


@contextmanager
def decoded_by_numba(format_name: str) -> Iterator[None]:
    """Compile a format's loops within: `MissingRequirementError` where numba can't be used."""
    try:
        yield
    except Exception as error:  # not installed, no place for its cache, no compiler for this processor: all alike here
        raise MissingRequirementError(
            f"{format_name} is decoded by numba, which can't be used: {said_by(error)}",
            hint="`ftload doctor` says how to fix it",
        ) from error


class StoredFormat(Protocol):
    """A way to store weights in fewer bits. Nothing that finds or shows them imports torch."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def method(self) -> str:
        """Its `quant_method` in config.json."""
        ...

    @property
    def kind(self) -> str:
        """What messages call its tensors: `4-bit`."""
        ...

    def find(self, headers: Headers, *, strict: bool) -> Iterator[PackedTensor]:
        """The tensors that are stored in this format.

        Raises `CheckpointError` for what can't be understood and, if `strict`, for what can't be decoded: parts that
        are missing or of another size, and what is known only to be shown.
        """
        ...

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """Whether config.json's `quantization_config` means this format; `found` says that there are such tensors."""
        ...

    def kept_settings(self, section: Mapping[str, Any]) -> dict[str, Any] | None:
        """What config.json goes on saying where weights stay packed; None where they are decoded."""
        ...
