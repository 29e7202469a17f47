"""A checkpoint as its headers describe it: where every tensor lies, without reading one.

safetensors: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data
(https://github.com/huggingface/safetensors, "Format"). Of pickled `.bin` files, pickles.py tells the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..source.file_names import REPORT_FILE
from ..source.source import Source
from .formats.interface import PackedTensor
from .formats.registry import logical_tensors
from .json_files import absent_error, read_json
from .pickles import Placed, read_pickle
from .plain import PlainReader
from .safetensors_header import read_header
from .tensors import DTYPE_CODES, TORCH_NAMES, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The headers of all files of a model's weights, and the way to read them."""

    source: Source
    tensors: Mapping[str, TensorMeta]
    """As the model knows them, by name: what is packed is one tensor, with its logical shape."""
    stored: Mapping[str, TensorMeta]
    """As the headers list them."""
    weight_files: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    pickled: bool = False
    """Whether the files are `.bin`."""
    loaded: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Tensors of `.bin` files that could not be read at their places, and are in memory."""
    dequantize: bool = False
    """Whether what transformers would load packed is decoded."""

    @cached_property
    def packed(self) -> tuple[PackedTensor, ...]:
        """The tensors that are decoded when they are read."""
        return tuple(tensor for tensor in self.tensors.values() if isinstance(tensor, PackedTensor))

    @property
    def stays_packed(self) -> bool:
        """Whether transformers loads some of it without decoding it."""
        return any(tensor.stays_packed for tensor in self.packed)

    def chunks(self, tensor: TensorMeta, elements: int, buffer: bytearray | None = None) -> Iterator[Tensor]:
        """Yield the elements of a tensor in order, flat, at most `elements` at a time, decoded where they are packed.

        With a `buffer`, each chunk may lie in it and is gone when the next one is asked for.
        Raises `CheckpointError` when the file ends early.
        """
        if isinstance(tensor, PackedTensor):
            return self._decoded(tensor, elements, buffer)
        return self._reader.chunks(tensor, elements, buffer)

    def values(self, tensor: TensorMeta, begin: int, end: int, buffer: memoryview | None = None) -> Tensor:
        """The elements from `begin` to `end` (exclusive), flat, decoded where they are packed.

        Those that are stored as they are may lie in the `buffer`, which takes just as many bytes.
        Of a file that was not fetched from a hub only what they are stored in travels.
        """
        if isinstance(tensor, PackedTensor):
            return tensor.part(begin, end, self._reader.values)
        return self._reader.values(tensor, begin, end, buffer)

    def read(self, tensor: TensorMeta) -> Tensor:
        """The whole tensor, in the dtype and shape of its values."""
        import torch

        for value in self.chunks(tensor, max(1, tensor.parameters)):
            return value.reshape(tensor.shape)
        return torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))

    def _decoded(self, tensor: PackedTensor, elements: int, buffer: bytearray | None) -> Iterator[Tensor]:
        """Chunks of `elements`, cut out of whole tiles.

        The last one of a tile is a copy: who still holds it would hold all of the tile while the next is decoded.
        """
        import torch

        if elements % tensor.tile == 0:
            for begin in range(0, tensor.parameters, elements):
                yield tensor.chunk(begin, min(begin + elements, tensor.parameters), self._reader.values, buffer)
            return
        step = max(tensor.tile, elements // tensor.tile * tensor.tile)
        rest = torch.empty(0, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        for begin in range(0, tensor.parameters, step):
            values = tensor.values(begin, min(begin + step, tensor.parameters), self._reader.values)
            taken = 0
            while (end := taken + elements - rest.numel()) <= values.numel():
                is_last = end + elements > values.numel() > elements
                piece = values[taken:end]
                yield torch.cat((rest, piece)) if rest.numel() or is_last else piece
                del piece
                taken, rest = end, rest[:0]
            rest = torch.cat((rest, values[taken:]))
            del values
        if rest.numel():
            yield rest

    @cached_property
    def _reader(self) -> PlainReader:
        return PlainReader(source=self.source, loaded=self.loaded)


def open_checkpoint(source: Source, *, allow_pickle: bool, strict: bool = True, dequantize: bool = False) -> Checkpoint:
    """Find the weight files as transformers would and read their headers.

    With `dequantize`, nothing stays packed.

    Raises `CheckpointError` for anything that is not a whole, well-formed checkpoint and, if `strict`, for packed
    tensors that can't be decoded.
    """
    names = {file.path: file for file in source.files}
    warnings: tuple[str, ...] = ()
    if SINGLE_FILE in names:
        weight_map: dict[str, str] = {}
        files: tuple[str, ...] = (SINGLE_FILE,)
        if INDEX_FILE in names:
            warnings = (f"both `{SINGLE_FILE}` and `{INDEX_FILE}` are there: the single file is used",)
    elif INDEX_FILE in names:
        weight_map = _read_index(source, INDEX_FILE)
        files = tuple(sorted(set(weight_map.values())))
    elif PICKLE_FILE in names or PICKLE_INDEX_FILE in names:
        return _open_pickles(source, allow_pickle=allow_pickle, strict=strict, dequantize=dequantize)
    else:
        hint = f"looked for {SINGLE_FILE} and {INDEX_FILE}"
        if REPORT_FILE in names:
            hint = "it was prepared, and its base lies elsewhere: give that, `ftload inspect` names it"
        raise absent_error(source, f"`{source.model}` holds no weights", hint)
    for name in files:
        if name not in names:
            raise absent_error(source, f"`{name}` is listed in `{INDEX_FILE}` but missing", "download the model again")
    stored: dict[str, TensorMeta] = {}
    for name in files:
        for tensor in read_header(name, names[name].bytes, lambda b, e, n=name: source.read(n, b, e)):
            other = stored.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(f"tensor `{tensor.name}` is both in `{other.file}` and in `{name}`")
    _check_index(weight_map, stored, INDEX_FILE)
    return Checkpoint(
        source=source, tensors=logical_tensors(source, stored, strict=strict, dequantize=dequantize), stored=stored,
        weight_files=files, warnings=warnings, dequantize=dequantize,
    )  # fmt: skip


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorMeta], index: str) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"tensor `{name}` is not in `{file}`, where `{index}` places it")


def _read_index(source: Source, index: str) -> dict[str, str]:
    weight_map = read_json(source, index, fetched=True).get("weight_map")  # offline, it says which files there are
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{index}` has no `weight_map`")
    for name, file in weight_map.items():
        # a name with a separator could lead out of the directory, another ending is not a shard
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"`{index}` places tensor `{name}` in {file!r}, which is not a shard's name")
    return weight_map


def _open_pickles(source: Source, *, allow_pickle: bool, strict: bool, dequantize: bool) -> Checkpoint:
    names = {file.path: file for file in source.files}
    if not allow_pickle:
        raise CheckpointError(
            f"`{source.model}` has only pickled weights (`{PICKLE_FILE}`)",
            hint="pickles can run code: pass --allow_pickle if you trust the source; it loads plain tensors alone",
        )
    weight_map: dict[str, str] = {}
    files: tuple[str, ...] = (PICKLE_FILE,)
    if PICKLE_FILE not in names:
        weight_map = _read_index(source, PICKLE_INDEX_FILE)
        files = tuple(sorted(set(weight_map.values())))
    for name in files:
        if name not in names:
            raise absent_error(
                source, f"`{name}` is listed in `{PICKLE_INDEX_FILE}` but missing", "download the model again"
            )
    if source.cached:
        # a pickle has no header that can be read alone
        source.fetch(files)
    stored: dict[str, TensorMeta] = {}
    loaded: dict[str, Tensor] = {}
    for name in files:
        with source.file(name) as file:
            values = read_pickle(file, name)
        for key, value in values.items():
            if not isinstance(value, Placed):
                loaded[key] = value
                value = Placed(
                    shape=tuple(value.shape),
                    dtype=str(value.dtype).removeprefix("torch."),
                    begin=0,
                    end=0,
                    strides=None,
                )
            code = DTYPE_CODES.get(value.dtype)
            if code is None:
                raise CheckpointError(f"`{name}`: tensor `{key}` has the dtype `{value.dtype}`")
            meta = TensorMeta(
                name=key, shape=value.shape, dtype=code, file=name, begin=value.begin, end=value.end,
                strides=value.strides,
            )  # fmt: skip
            other = stored.setdefault(key, meta)
            if other is not meta:
                raise CheckpointError(f"tensor `{key}` is both in `{other.file}` and in `{name}`")
    _check_index(weight_map, stored, PICKLE_INDEX_FILE)
    return Checkpoint(
        source=source, tensors=logical_tensors(source, stored, strict=strict, dequantize=dequantize), stored=stored,
        weight_files=files, pickled=True, loaded=loaded, dequantize=dequantize,
    )  # fmt: skip
