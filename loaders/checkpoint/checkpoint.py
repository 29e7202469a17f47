"""A checkpoint as its headers describe it: where every tensor lies, without reading one.

safetensors: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data
(https://github.com/huggingface/safetensors, "Format"). Of pickled `.bin` files, pickles.py tells the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import CheckpointError, SourceError
from ..source.source import Source
from .json_files import absent_error, read_json
from .pickles import Placed, read_pickle
from .safetensors_header import read_header
from .tensors import DTYPE_CODES, ITEM_BYTES, TORCH_NAMES, TensorMeta

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
            raise absent_error(source, f"`{name}` is listed in `{INDEX_FILE}` but missing", "download the model again")
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


def _read_index(source: Source, index: str) -> dict[str, str]:
    weight_map = read_json(source, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{index}` has no `weight_map`")
    for name, file in weight_map.items():
        # a name with a separator could lead out of the directory, another ending is not a shard
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"`{index}` places tensor `{name}` in {file!r}, which is not a shard's name")
    return weight_map


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
            raise absent_error(
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
