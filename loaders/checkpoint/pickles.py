"""Pickled weights: where each tensor lies in the file, so that it is read like any other and never memory-mapped.

A file that is cut short while it is mapped kills the process (SIGBUS). `torch.save` writes a zip archive whose records
`data/0`, `data/1`, … are the storages, uncompressed; `torch.load` under fake tensors unpickles with nothing but their
offsets.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO
from warnings import catch_warnings, simplefilter

from ..errors import CheckpointError, FtloadError, said_by

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A pickled tensor that can be read at its place."""

    shape: tuple[int, ...]
    dtype: str
    """torch's name."""
    begin: int
    """First byte in the file of the elements that it spans."""
    end: int
    strides: tuple[int, ...] | None
    """In elements; None where they lie one after another."""


def read_pickle(file: BinaryIO, name: str) -> dict[str, Placed | Tensor]:
    """Unpickle a `.bin` file, of this name: plain tensors by name, placed in it or, where that can't be, loaded.

    Loaded whole is what torch before 1.6 wrote, another machine's byte order, and an archive that was packed anew.
    Raises `CheckpointError` naming the file for anything but a dictionary of dense tensors.
    """
    import torch

    state = _unpickle(file, name)
    if not isinstance(state, dict):
        raise CheckpointError(f"`{name}` does not hold a dictionary of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise CheckpointError(f"`{name}`: `{key}` is not a plain tensor")
    return {key: _place(value, name) if _is_fake(value) else value.detach() for key, value in state.items()}


def _unpickle(file: BinaryIO, name: str) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with catch_warnings():
            simplefilter("ignore")  # a protocol that torch would not have chosen; it loads or it doesn't
            records = _records(file, name)
            if records is not None:
                file.seek(0)
                with FakeTensorMode():
                    state = torch.load(file, **options)
                if _lie_in_records(state, records):
                    return state
            file.seek(0)
            return torch.load(file, **options)
    except FtloadError:
        raise
    except Exception as error:  # torch raises many types here, none of which names the file
        raise CheckpointError(
            f"`{name}` can't be loaded as plain tensors: {said_by(error)}",
            hint="it may be incomplete or hold code: convert it to safetensors",
        ) from error


def _records(file: BinaryIO, name: str) -> dict[int, int] | None:
    """Offset to length of the archive's records; None where they can't be read as they are."""
    records = {}
    if file.read(4) != b"PK\3\4":
        return None
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"`{name}` is compressed", hint="convert it to safetensors")
            if info.filename.endswith("/byteorder") and archive.read(info).decode() != sys.byteorder:
                return None
            # the local header: 30 bytes, then the name and an extra field (PKWARE's APPNOTE, 4.3.7)
            file.seek(info.header_offset + 26)
            length, extra = struct.unpack("<HH", file.read(4))
            records[info.header_offset + 30 + length + extra] = info.file_size
    return records


def _is_fake(value: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def _lie_in_records(state: Any, records: dict[int, int]) -> bool:
    """Whether the offsets that torch computes, from the way in which it writes, are those of this archive."""
    for value in state.values() if isinstance(state, dict) else ():
        if _is_fake(value) and value.numel():
            storage = value.untyped_storage()
            if records.get(storage._checkpoint_offset, -1) < storage.nbytes():
                return False
    return True


def _place(value: Tensor, name: str) -> Placed:
    size = value.element_size()
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) if value.numel() else -1
    storage: Any = value.untyped_storage()
    if size * (value.storage_offset() + last + 1) > storage.nbytes():
        raise CheckpointError(f"`{name}`: a tensor reaches beyond its data", hint="convert it to safetensors")
    begin: int = (storage._checkpoint_offset or 0) + size * int(value.storage_offset())
    return Placed(
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        begin=begin,
        end=begin + size * (last + 1),
        strides=None if value.is_contiguous() else tuple(value.stride()),
    )
