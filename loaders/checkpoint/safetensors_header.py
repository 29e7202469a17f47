"""The header of a safetensors file.

8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError
from .json_files import TRUNCATED, lfs_pointer_error, parse_json
from .tensors import ITEM_BYTES, TensorMeta

MAX_HEADER_BYTES = 25_000_000
"""Of 150,000 tensors in one file. The safetensors library itself stops at 100 MB, which would take 2 GB of memory."""


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> tuple[TensorMeta, ...]:
    """Parse and check the header of one safetensors file of `size` bytes.

    Every element is checked: dtype times shape is the length of the data, the data lie one after another and end
    with the file. What is taken here, the safetensors library takes too: the file may be copied as it is.
    Raises `CheckpointError` naming the file.
    """
    if size < 8:
        raise CheckpointError(f"`{file}` is {size} bytes long: not a safetensors file", hint=TRUNCATED)
    first = read(0, min(size, 64 * 1024))
    (length,) = struct.unpack("<Q", first[:8])
    if pointer := lfs_pointer_error(first, file):
        raise pointer
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(f"`{file}` has a header of {length} bytes in a file of {size}", hint=TRUNCATED)
    raw = first[8 : 8 + length] if 8 + length <= len(first) else first[8:] + read(len(first), 8 + length)
    header = parse_json(raw, file, strict=True)
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
            f"`{file}` {problem}: its header describes {position} bytes, it has {size}", hint=TRUNCATED
        )
    return tuple(tensors)


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
