"""Files on a disk: read in time, made durable, hashed, and what to say when it fails."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import re
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .errors import OutputError, ResourceError

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
    """The tokenizers library raises a bare `Exception` for what the system says: make it an `OSError` again."""
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)$", str(error)) if type(error) is Exception else None
        if said is None:
            raise
        number = int(said[1])
        raise OSError(number, os.strerror(number)) from error


@contextlib.contextmanager
def read_ahead(paths: Iterable[Path], most: int) -> Iterator[None]:
    """Have the page cache take these files in, one after another and at most so many bytes, while a block runs.

    A hint: a file that can't be read is told of when it is needed, and nobody waits for a piece that is still on its
    way when the block ends: a share on the network may take its time.
    """
    stopped = threading.Event()
    arguments = (paths, most, stopped)
    threading.Thread(target=_read_ahead, args=arguments, name="ftload-ahead", daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def _read_ahead(paths: Iterable[Path], most: int, stopped: threading.Event) -> None:
    nowhere = Path(os.devnull)
    if not nowhere.is_char_device():  # in some bare containers; a file would be written in its place
        return
    with nowhere.open("wb") as null:
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                position = 0
                while most > 0 and not stopped.is_set():
                    # to /dev/null nothing is copied: the pages are read, and that is all
                    count = os.sendfile(null.fileno(), file.fileno(), position, min(most, _READ_AHEAD_AT_ONCE))
                    if not count:
                        break
                    if not position and not _stays_cached(path):
                        return
                    position += count
                    most -= count


_READ_AHEAD_AT_ONCE = 16 * 1024 * 1024
"""Bytes. After each piece the interpreter's lock must be had again, for which one may wait 5 ms."""


def _stays_cached(path: Path) -> bool:
    """Whether the page cache has the beginning of a file for whoever opens it next (mincore(2)).

    Most FUSE file systems have the cache dropped whenever a file is opened: what is read ahead would travel twice.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_COPY) as mapped:
        state = ctypes.c_ubyte()
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(1), ctypes.byref(state))
        del begin  # a mapping that is pointed into can't be closed
    return bool(failed or state.value & 1)


def start_writing_back(descriptor: int, begin: int, count: int) -> None:
    """Have the system write these bytes to the disk from now on (sync_file_range(2)): fsync finds little left.

    A hint: where it can't be taken, nothing is lost.
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


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
