"""Files read into the page cache before their bytes are needed.

By sendfile to /dev/null, not by posix_fadvise(POSIX_FADV_WILLNEED): Linux reads no more a call than the device's
read-ahead, 128 KiB by default, and returns before the pages are there. In pieces that small it is no faster, and slower
where another thread holds the interpreter's lock.
"""

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
    """Read these files into the page cache, one after another and `most` bytes in all, while a block runs.

    A hint: a file that can't be read is reported when it is needed, and the end of the block doesn't wait for the
    piece that is being read: a network share may be slow.
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
                    # the pages are read, and /dev/null copies nothing
                    count = os.sendfile(null.fileno(), file.fileno(), position, min(most, _READ_AHEAD_AT_ONCE))
                    if not count:
                        break
                    if not position and not _stays_cached(path):
                        return
                    position += count
                    most -= count


_READ_AHEAD_AT_ONCE = 16 * 1024 * 1024
"""Bytes. After each piece the thread waits for the interpreter's lock, up to 5 ms."""


def _stays_cached(path: Path) -> bool:
    """Whether the beginning of a file is still in the page cache when the file is opened again (mincore(2)).

    Most FUSE file systems drop a file's pages whenever it is opened: what is read ahead would be read twice.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_COPY) as mapped:
        state = ctypes.c_ubyte()
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(1), ctypes.byref(state))
        del begin  # a mapping that is pointed into can't be closed
    return bool(failed or state.value & 1)
