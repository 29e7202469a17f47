"""What the system's page cache holds of a file, and making it forget."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest


def forget(path: Path) -> None:
    """Have nothing of a file in the page cache; skips the test where that can't be had, as in a tmpfs."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path):
        pytest.skip("the page cache keeps files of this file system")


def cached_bytes(path: Path) -> int:
    """What the page cache holds of a file, in whole pages (mincore(2))."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
        del start  # a mapping that is pointed into can't be closed
    assert not failed
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
