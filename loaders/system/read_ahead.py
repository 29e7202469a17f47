"""The page cache filled before the bytes are needed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def read_ahead(paths: Iterable[Path], most: int) -> Iterator[None]:
    """Have the page cache take these files in, one after another and at most so many bytes, while a block runs.

    A hint: a file that can't be read is reported when it is needed, and nobody waits for a piece that is still on its
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
