"""The tensors of a checkpoint as the model knows them, from headers alone: a packed weight and its parts are one.

There are no modules here, so each tensor's component is decided by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from ..checkpoint.formats.interface import PackedTensor, StoredFormat
from ..checkpoint.formats.registry import logical_tensors
from ..checkpoint.safetensors_header import read_header
from ..checkpoint.tensors import TensorMeta
from ..errors import CheckpointError
from ..model.components import Component, component_of
from ..source.file_names import ADAPTER_FILE
from ..source.source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor as the model knows it."""

    name: str
    dtype: str
    """torch's name, the tag of a packed format, or a GGUF type."""
    shape: tuple[int, ...]
    """The logical shape."""
    bytes: int
    """Of the data, as the report counts it."""
    file: str
    component: Component
    parts: tuple[tuple[Path, int, int], ...]
    """File, first byte and end of everything that it is stored in, in the order of the parts' names."""
    format: StoredFormat | None = None
    """What it is packed in."""

    @property
    def parameters(self) -> int:
        """The number of elements, packed ones included."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """Of some tensors."""

    tensors: int
    parameters: int
    bytes: int


def sum_of(tensors: Iterable[StoredTensor]) -> Sum:
    """Count tensors, their parameters and their bytes."""
    tensors = tuple(tensors)
    return Sum(
        tensors=len(tensors),
        parameters=sum(tensor.parameters for tensor in tensors),
        bytes=sum(tensor.bytes for tensor in tensors),
    )


def grouped(tensors: Iterable[StoredTensor], attribute: str) -> dict[str, list[StoredTensor]]:
    """Tensors by the value of an attribute, in the order of the values."""
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, attribute), []).append(tensor)
    return dict(sorted(groups.items()))


def open_tensors(source: Source) -> tuple[Mapping[str, TensorMeta], tuple[str, ...]]:
    """The tensors of the usual weight files by name, or else of any other files, and warnings."""
    sizes = {file.path: file.bytes for file in source.files}
    if SINGLE_FILE in sizes or INDEX_FILE in sizes:
        checkpoint = open_checkpoint(source, allow_pickle=False, strict=False)
        return checkpoint.tensors, checkpoint.warnings
    stored: dict[str, TensorMeta] = {}
    for name, size in sizes.items():
        if name.endswith(".safetensors") and name != ADAPTER_FILE:
            for tensor in read_header(name, size, lambda b, e, n=name: source.read(n, b, e)):
                other = stored.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(f"tensor `{tensor.name}` is both in `{other.file}` and in `{name}`")
    return logical_tensors(source, stored, strict=False), ()


def stored_tensors(
    source: Source, tensors: Iterable[TensorMeta], prefix: str = "", component: Component | None = None
) -> list[StoredTensor]:
    """Describe tensors of `source`, all of one `component` or each of its own.

    `prefix` is put before the names of their files.
    """
    return [
        StoredTensor(
            name=tensor.name,
            dtype=tensor.counted_as,
            shape=tensor.shape,
            bytes=tensor.stored_bytes,
            file=prefix + tensor.file,
            component=component or component_of(tensor.name),
            parts=tuple(
                (source.root / part.file, part.begin, part.end)
                for part in sorted(tensor.stored_in, key=lambda part: part.name)
            ),
            format=tensor.format if isinstance(tensor, PackedTensor) else None,
        )
        for tensor in tensors
    ]


def natural_key(name: str) -> list[Any]:
    """Sorts `layers.2` before `layers.10`."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
