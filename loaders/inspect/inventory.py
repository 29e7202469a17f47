"""The tensors of a checkpoint as its headers list them, each with what it is for.

A 4-bit weight and its statistics are one tensor here. The modules are not known, so names alone tell what is for what.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from ..checkpoint.safetensors_header import read_header
from ..checkpoint.tensors import TORCH_NAMES, TensorMeta
from ..errors import CheckpointError
from ..model.components import Component, component_by_name
from ..source.source import ADAPTER_FILE, Source

_STATE = ".quant_state.bitsandbytes__"


_MAX_STATE_BYTES = 10_000


_REQUESTS = 16
"""Ranges that are asked of a hub at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor as the model knows it: a 4-bit weight and its statistics are one."""

    name: str
    dtype: str
    """torch's name, `nf4` or `fp4`, or a GGUF type."""
    shape: tuple[int, ...]
    """The logical shape."""
    bytes: int
    """Of the data; the JSON state of a 4-bit weight counts as file overhead, as in the report."""
    file: str
    component: Component
    parts: tuple[tuple[Path, int, int], ...]
    """File, first byte and end of everything that it is stored in, in the order of the parts' names."""

    @property
    def parameters(self) -> int:
        """The number of elements, packed ones included."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether 4-bit coverage is asked of it: a weight matrix outside embeddings and head."""
        return len(self.shape) >= 2 and self.component not in ("embedding", "head", "norm", "adapter")


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
    """The model's tensors by name, and what to warn of; without weights under the usual names, of any other."""
    sizes = {file.path: file.bytes for file in source.files}
    if SINGLE_FILE in sizes or INDEX_FILE in sizes:
        checkpoint = open_checkpoint(source, allow_pickle=False)
        return checkpoint.tensors, checkpoint.warnings
    tensors: dict[str, TensorMeta] = {}
    for name, size in sizes.items():
        if name.endswith(".safetensors") and name != ADAPTER_FILE:
            for tensor in read_header(name, size, lambda b, e, n=name: source.read(n, b, e)):
                other = tensors.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(f"tensor `{tensor.name}` is both in `{other.file}` and in `{name}`")
    return tensors, ()


def stored_tensors(source: Source, metas: Mapping[str, TensorMeta], prefix: str = "") -> list[StoredTensor]:
    """The tensors of some headers, 4-bit weights put together; `prefix` is put before the names of their files.

    Raises `CheckpointError` for the state of a 4-bit weight that is malformed.
    """
    packed = _packed(source, metas)
    parts: dict[str, list[TensorMeta]] = {}
    for name, meta in metas.items():
        weight = name.partition(_STATE)[0]
        owner = weight if weight in packed else name.rpartition(".")[0]
        parts.setdefault(owner if owner in packed else name, []).append(meta)
    tensors = []
    for name, group in parts.items():
        first = metas[name]
        dtype, shape = packed.get(name, (TORCH_NAMES[first.dtype], first.shape))
        tensors.append(
            StoredTensor(
                name=name,
                dtype=dtype,
                shape=shape,
                bytes=sum(meta.nbytes for meta in group if _STATE not in meta.name),
                file=prefix + first.file,
                component=component_by_name(name),
                parts=tuple(
                    (source.root / meta.file, meta.begin, meta.end)
                    for meta in sorted(group, key=lambda meta: meta.name)
                ),
            )
        )
    return tensors


def _packed(source: Source, metas: Mapping[str, TensorMeta]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """4-bit weights, by name: dtype and logical shape. Reads their small JSON states."""
    states = [meta for name, meta in metas.items() if _STATE in name]

    def read(state: TensorMeta) -> bytes:
        if state.nbytes > _MAX_STATE_BYTES:
            raise CheckpointError(f"tensor `{state.name}` of `{state.file}` is not a bitsandbytes state")
        return source.read(state.file, state.begin, state.end)

    if source.kind == "hub":
        with ThreadPoolExecutor(_REQUESTS) as pool:
            contents = list(pool.map(read, states))
    else:
        contents = [read(state) for state in states]
    packed = {}
    for state, raw in zip(states, contents, strict=True):
        weight, _, dtype = state.name.partition(_STATE)
        try:
            shape = tuple(int(n) for n in json.loads(raw)["shape"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"tensor `{state.name}` of `{state.file}` is not a bitsandbytes state") from error
        if min(shape, default=0) < 0 or weight not in metas or metas[weight].nbytes != (math.prod(shape) + 1) // 2:
            raise CheckpointError(f"tensor `{weight}` does not have the size that its 4-bit state tells")
        packed[weight] = dtype, shape
    return packed


def natural_key(name: str) -> list[Any]:
    """Sorts `layers.2` before `layers.10`."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
