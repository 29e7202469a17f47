"""Reading ahead: what it does is seen in the page cache alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from ftload.loaders.disk import read_ahead

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


def test_reading_ahead_goes_from_file_to_file_up_to_its_limit(files: list[Path]) -> None:
    limit = _SIZE + _SIZE // 4
    with read_ahead(files, limit):
        for thread in _readers():
            thread.join(30)  # at its limit it ends by itself
        assert not _readers()
    first, second, third = map(cached_bytes, files)
    # the system may have taken pages back, and it reads a little more than it is asked for
    assert first > _SIZE * 7 // 8
    assert _SIZE // 8 < second < _SIZE
    assert third == 0


def test_reading_ahead_ends_with_its_block_and_says_nothing_of_errors(files: list[Path], tmp_path: Path) -> None:
    with read_ahead([tmp_path / "absent", *files], 4 * _SIZE):
        pass
    assert not _readers()
    with pytest.raises(KeyError), read_ahead(files, 4 * _SIZE):
        raise KeyError
    assert not _readers()


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ftload-ahead"]
