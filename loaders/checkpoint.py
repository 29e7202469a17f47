"""A checkpoint as its headers describe it: where every tensor lies, without reading one.

safetensors: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data
(https://github.com/huggingface/safetensors, "Format"). Of pickled `.bin` files, pickles.py tells the same.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import CheckpointError, SourceError
from .pickles import Placed, read_pickle
from .source import Source, config_file_names

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"

MAX_HEADER_BYTES = 25_000_000
"""Of 150,000 tensors in one file. The safetensors library itself stops at 100 MB, which would take 2 GB of memory."""

MAX_JSON_BYTES = 25_000_000
"""Of a configuration or an index; the largest that are known have 9 MB."""

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
    """One stored tensor: what it is and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The safetensors code: `BF16`, `F32`, …"""
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
        """Stored size in bytes."""
        return self.parameters * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The headers of all files of a model's weights, and the way to read them."""

    source: Source
    tensors: Mapping[str, TensorMeta]
    weight_files: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    pickled: bool = False
    """Whether the files are `.bin`."""
    loaded: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Tensors of `.bin` files that could not be read at their places, and are in memory."""

    def chunks(self, tensor: TensorMeta, elements: int, buffer: bytearray | None = None) -> Iterator[Tensor]:
        """Yield the elements of a tensor in order, flat, at most `elements` at a time, in the stored dtype.

        With a `buffer`, each chunk lies in it and is gone when the next one is asked for.
        Raises `CheckpointError` when the file ends early.
        """
        import torch

        if tensor.name in self.loaded:
            yield from self.loaded[tensor.name].reshape(-1).split(elements)
            return
        if tensor.strides is not None:
            yield from self._gathered(tensor, tensor.strides, elements)
            return
        dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
        size = elements * ITEM_BYTES[tensor.dtype]
        path = self.source.root / tensor.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(tensor.begin)
                for begin in range(tensor.begin, tensor.end, size):
                    count = min(size, tensor.end - begin)
                    if buffer is None or len(buffer) < count:
                        view = memoryview(bytearray(count))
                    else:
                        view = memoryview(buffer)[:count]
                    _read_exactly(file.readinto, view, tensor)
                    yield torch.frombuffer(view, dtype=dtype)
        except OSError as error:
            raise SourceError(f"can't read `{path}`: {error.strerror or error}") from error

    def _gathered(self, tensor: TensorMeta, strides: tuple[int, ...], elements: int) -> Iterator[Tensor]:
        """The chunks of a tensor whose elements lie scattered in its bytes, all of which are held."""
        import torch

        count = (tensor.end - tensor.begin) // ITEM_BYTES[tensor.dtype]
        (span,) = self.chunks(replace(tensor, shape=(count,), strides=None), count)
        for begin in range(0, tensor.parameters, elements):
            rest = torch.arange(begin, min(begin + elements, tensor.parameters))
            index = torch.zeros_like(rest)
            for size, stride in zip(reversed(tensor.shape), reversed(strides), strict=True):
                index += rest % size * stride
                rest //= size
            yield span[index]

    def read(self, tensor: TensorMeta) -> Tensor:
        """The whole tensor, in its stored dtype and shape."""
        import torch

        for value in self.chunks(tensor, max(1, tensor.parameters)):
            return value.reshape(tensor.shape)
        return torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))


def fetch_config(source: Source) -> None:
    """Have the files that describe the model, and see that they can be read at all.

    Raises `CheckpointError` where there is no `config.json`, or one of them is not JSON.
    """
    names = {file.path: file for file in source.files}
    if "config.json" not in names:
        hint = "a model directory holds config.json, a tokenizer and *.safetensors"
        if "adapter_config.json" in names:
            hint = "this is an adapter: give the model that it was trained on"
        raise _absent(source, f"`{source.model}` holds no `config.json`", hint)
    found = config_file_names(source.files)
    source.fetch(found)
    for name in found:
        size = names[name].bytes
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"`{source.root / name}` is {size} bytes long")
        _check_sizes(_parse_json(source.read(name, 0, size), str(source.root / name)), str(source.root / name))


_MOST = {
    re.compile(r"(layers?|cycles)$"): 2_000,
    re.compile(r"labels$"): 100_000,
    re.compile(r"(dim|size|heads|experts|embd|inner)$"): 10_000_000,
}
"""Keys of a configuration, and the largest value that they can have. Without a bound, a number of a few digits makes
transformers build modules, or lists of them, until memory or patience end; the largest models have a tenth of this."""


def _check_sizes(document: Any, file: str) -> None:
    waiting = [document]
    while waiting:
        place = waiting.pop()
        if isinstance(place, list):
            waiting += place
        elif isinstance(place, dict):
            waiting += place.values()
            for key, value in place.items():
                for pattern, most in _MOST.items():
                    if isinstance(value, int | float) and pattern.search(key) and value > most:
                        raise CheckpointError(f"`{file}`: `{key}` is more than the {most:,} of any real model")


def open_checkpoint(source: Source, *, allow_pickle: bool) -> Checkpoint:
    """Find the weight files as transformers would and read their headers.

    Raises `CheckpointError` for anything that is not a whole, well-formed checkpoint.
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
        return _open_pickles(source, allow_pickle=allow_pickle)
    else:
        raise CheckpointError(f"`{source.model}` holds no weights", hint=f"looked for {SINGLE_FILE} and {INDEX_FILE}")
    for name in files:
        if name not in names:
            raise _absent(source, f"`{name}` is listed in `{INDEX_FILE}` but missing", "download the model again")
    tensors: dict[str, TensorMeta] = {}
    for name in files:
        for tensor in read_header(name, names[name].bytes, lambda b, e, n=name: source.read(n, b, e)):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(f"tensor `{tensor.name}` is both in `{other.file}` and in `{name}`")
    _check_index(weight_map, tensors, INDEX_FILE)
    return Checkpoint(source=source, tensors=tensors, weight_files=files, warnings=warnings)


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorMeta], index: str) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"tensor `{name}` is not in `{file}`, where `{index}` places it")


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> tuple[TensorMeta, ...]:
    """Parse and check the header of one safetensors file of `size` bytes.

    Every element is checked: dtype times shape is the length of the data, the data lie one after another and end
    with the file. What is taken here, the safetensors library takes too: the file may be copied as it is.
    Raises `CheckpointError` naming the file.
    """
    if size < 8:
        raise CheckpointError(f"`{file}` is {size} bytes long: not a safetensors file", hint=_TRUNCATED)
    first = read(0, min(size, 64 * 1024))
    (length,) = struct.unpack("<Q", first[:8])
    if first.startswith(_LFS_POINTER):
        raise _lfs_pointer(file)
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(f"`{file}` has a header of {length} bytes in a file of {size}", hint=_TRUNCATED)
    raw = first[8 : 8 + length] if 8 + length <= len(first) else first[8:] + read(len(first), 8 + length)
    header = _parse_json(raw, file, strict=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"`{file}`: the `__metadata__` of the header is malformed")
    tensors = [_tensor_meta(name, entry, file, 8 + length) for name, entry in header.items()]
    position = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            raise CheckpointError(f"`{file}`: the data of `{tensor.name}` overlap or leave a gap")
        position = tensor.end
    if position != size:
        problem = "is truncated" if position > size else "has bytes that belong to no tensor"
        raise CheckpointError(
            f"`{file}` {problem}: its header describes {position} bytes, it has {size}", hint=_TRUNCATED
        )
    return tuple(tensors)


_TRUNCATED = "the file is incomplete or of another kind: download it again"
_LFS_POINTER = b"version https://git-lfs"


def _lfs_pointer(file: str) -> CheckpointError:
    return CheckpointError(f"`{file}` is a Git LFS pointer, not the file itself", hint="run `git lfs pull`")


def _absent(source: Source, message: str, hint: str) -> CheckpointError | SourceError:
    """A missing file is the checkpoint's fault, unless only a cache could be looked into."""
    if source.from_cache:
        return SourceError(f"{message} in the cache", hint="go online and run it again")
    return CheckpointError(message, hint=hint)


def _tensor_meta(name: str, entry: Any, file: str, data_begin: int) -> TensorMeta:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        dtype, shape, begin, end = None, None, 0, -1
    if (
        not isinstance(shape, list)
        or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
        or begin > end
        or len(shape) > 64
    ):
        raise CheckpointError(f"`{file}`: the header entry of `{name}` is malformed")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"`{file}`: tensor `{name}` has the unknown dtype `{dtype}`")
    meta = TensorMeta(
        name=name, shape=tuple(shape), dtype=dtype, file=file, begin=data_begin + begin, end=data_begin + end
    )
    if meta.nbytes != end - begin:
        raise CheckpointError(
            f"`{file}`: tensor `{name}` of shape {shape} and dtype {dtype} should take {meta.nbytes} bytes, "
            f"its header says {end - begin}"
        )
    return meta


def _read_index(source: Source, index: str) -> dict[str, str]:
    weight_map = read_json(source, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{index}` has no `weight_map`")
    for name, file in weight_map.items():
        # a name with a separator could lead out of the directory, another ending is not a shard
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"`{index}` places tensor `{name}` in {file!r}, which is not a shard's name")
    return weight_map


def read_json(source: Source, name: str, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in one of the source's JSON files. Raises `CheckpointError` for anything else, naming the file."""
    size = next(file.bytes for file in source.files if file.path == name)
    if size > most_bytes:
        raise CheckpointError(f"`{name}` is {size} bytes long")
    return _parse_json(source.read(name, 0, size), name)


def _parse_json(raw: bytes, file: str, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object without repeated keys; `strict` as in RFC 8259, not with all that Python's parser takes as well."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"`{file}` names a key twice")
        return result

    try:
        if strict:
            text = raw.decode()
            value = json.loads(
                text, object_pairs_hook=unique, parse_constant=_refuse, parse_float=_refuse, parse_int=_integer
            )
            if "\\u" in text:
                json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no character
        else:
            value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if raw.startswith(_LFS_POINTER):
            raise _lfs_pointer(file) from error
        raise CheckpointError(f"`{file}` is not valid JSON", hint=_TRUNCATED) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{file}` is not a JSON object", hint=_TRUNCATED)
    return value


def _integer(literal: str) -> int:
    """For an integer of a header; the library can't take more digits than a float has."""
    return int(literal) if len(literal) <= 300 else _refuse(literal)


def _refuse(literal: str) -> NoReturn:
    """For what has no place in a header: fractions, NaN and infinity."""
    raise ValueError(literal)


def _read_exactly(readinto: Callable[[memoryview], int | None], view: memoryview, tensor: TensorMeta) -> None:
    while view:
        count = readinto(view)
        if not count:
            raise CheckpointError(
                f"`{tensor.file}` ends within tensor `{tensor.name}`",
                hint="the file changed while it was read",
            )
        view = view[count:]


def _open_pickles(source: Source, *, allow_pickle: bool) -> Checkpoint:
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
            raise _absent(
                source, f"`{name}` is listed in `{PICKLE_INDEX_FILE}` but missing", "download the model again"
            )
    # a pickle has no header that can be read alone
    source.fetch(files)
    tensors: dict[str, TensorMeta] = {}
    loaded: dict[str, Tensor] = {}
    for name in files:
        for key, value in read_pickle(source.root / name).items():
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
            other = tensors.setdefault(key, meta)
            if other is not meta:
                raise CheckpointError(f"tensor `{key}` is both in `{other.file}` and in `{name}`")
    _check_index(weight_map, tensors, PICKLE_INDEX_FILE)
    return Checkpoint(source=source, tensors=tensors, weight_files=files, pickled=True, loaded=loaded)
