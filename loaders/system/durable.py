"""Files made durable, hashed, and what to say when the disk fails."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import OutputError, ResourceError
from ..progress import Progress
from .limits import usable_processors

_WRONG_PLACE = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT,
     errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ENOTEMPTY)
)  # fmt: skip


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Name the file when writing fails: `OutputError` where the place is wrong, `ResourceError` where the disk is."""
    try:
        with _errors_of_rust():
            yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _WRONG_PLACE:
            raise OutputError(f"can't write `{path}`: {reason}", hint="choose another --output_dir") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"can't write `{path}`: {reason}", hint="free some disk space") from error
        raise ResourceError(f"can't write `{path}`: {reason}") from error


@contextlib.contextmanager
def _errors_of_rust() -> Iterator[None]:
    """Turn the bare `Exception` that the tokenizers library raises for a system error into an `OSError` again."""
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)$", str(error)) if type(error) is Exception else None
        if said is None:
            raise
        number = int(said[1])
        raise OSError(number, os.strerror(number)) from error


def start_writing_back(descriptor: int, begin: int, count: int) -> None:
    """Have the system begin to write these bytes to the disk (sync_file_range(2)), so that fsync has little left to do.

    A hint: where the system has no such call, nothing is lost.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, begin, count, _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2


@cache
def _sync_file_range() -> Any | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def hash_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hexadecimal. `advance` is called with the bytes since its last call."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()


_HASHED_BYTES = 1024 * 1024


def hash_files(sizes: Mapping[Path, int], progress: Progress) -> dict[Path, str | None]:
    """The sha256 of each file, several at a time; None where one can't be read or has another size than this.

    Whatever is found, `progress` comes to its end: the sum of the sizes.
    """
    lock = threading.Lock()
    progress.expect(bytes=sum(sizes.values()), tensors=0)

    def advance(count: int) -> None:
        with lock:
            progress.advance(bytes=count, tensors=0)

    def look_at(path: Path) -> str | None:
        left = sizes[path]

        def count(number: int) -> None:
            nonlocal left
            left -= number
            advance(number)

        try:
            return hash_file(path, count) if path.is_file() and path.stat().st_size == left else None
        except OSError:
            return None
        finally:
            advance(left)

    with ThreadPoolExecutor(usable_processors()) as pool:
        return dict(zip(sizes, pool.map(look_at, sizes), strict=True))


def hash_or_none(path: Path) -> str | None:
    """The sha256 of a file; None where it can't be read."""
    try:
        return hash_file(path)
    except OSError:
        return None


def sync_file(path: Path) -> None:
    """Make a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
