"""Reading ahead, and reading what is not to stay: neither changes a byte, both are seen in the page cache."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from ftload.loaders.disk import read_ahead, read_at

from ..page_cache import cached_bytes, forget

_SIZE = 32 * 1024 * 1024


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files that are not in the page cache."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(os.urandom(_SIZE))
        forget(path)
    return paths


@pytest.mark.parametrize("keep", [False, True])
def test_reading_at_a_position(files: list[Path], keep: bool) -> None:
    if not keep and not _can_drop(files[0]):
        pytest.skip("this system has no RWF_DONTCACHE (Linux 6.14), or not for this file system")
    read = bytearray(_SIZE)
    with files[1].open("rb") as file:
        for begin in range(0, _SIZE, 2**20 - 1):
            view = memoryview(read)[begin : begin + 2**20 - 1]
            assert read_at(file.fileno(), view, begin, keep=keep) == len(view)
        assert read_at(file.fileno(), memoryview(bytearray(1)), _SIZE, keep=keep) == 0

    cached = cached_bytes(files[1])

    assert read == files[1].read_bytes()
    assert (cached == _SIZE) if keep else (cached < _SIZE // 4)  # a little that the system read ahead


def test_what_was_in_the_page_cache_stays_there(files: list[Path]) -> None:
    files[0].read_bytes()
    with files[0].open("rb") as file:
        assert read_at(file.fileno(), memoryview(bytearray(_SIZE)), 0, keep=False) == _SIZE
    assert cached_bytes(files[0]) == _SIZE


def test_an_error_is_told(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            read_at(descriptor, memoryview(bytearray(1)), 0, keep=False)
    finally:
        os.close(descriptor)


def test_reading_ahead_goes_from_file_to_file_up_to_its_limit(files: list[Path]) -> None:
    limit = _SIZE + _SIZE // 4
    with read_ahead(files, limit):
        until = time.monotonic() + 30
        while sum(map(cached_bytes, files)) < limit and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)  # it goes no further, wait or not
    first, second, third = map(cached_bytes, files)
    assert first == _SIZE
    assert _SIZE // 4 <= second < _SIZE  # the system itself reads a little more than it is asked for
    assert third == 0
    assert not _is_reading()


def test_reading_ahead_ends_with_its_block_and_says_nothing_of_errors(files: list[Path], tmp_path: Path) -> None:
    with read_ahead([tmp_path / "absent", *files], 4 * _SIZE):
        pass
    assert not _is_reading()
    with pytest.raises(KeyError), read_ahead(files, 4 * _SIZE):
        raise KeyError
    assert not _is_reading()


def _is_reading() -> bool:
    return any(thread.name == "ftload-ahead" for thread in threading.enumerate())


def _can_drop(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, 0x80) == 1
        except OSError:
            return False
