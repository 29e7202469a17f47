"""Reading ahead: what it does is seen in the page cache, and in what it asks the system for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from ftload.loaders.system.read_ahead import read_ahead

from ..page_cache import cached_bytes, forget

_SIZE = 32 * 1024 * 1024
SendFile = Callable[[int, int, int, int], int]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files that are not in the page cache."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(os.urandom(_SIZE))
        forget(path)
    return paths


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that reading ahead asks the system for, piece by piece."""
    counts: list[int] = []
    real = os.sendfile

    def noting(out: int, source: int, offset: int, count: int) -> int:
        counts.append(count)
        return real(out, source, offset, count)

    monkeypatch.setattr("os.sendfile", noting)
    return counts


def test_reading_ahead_goes_from_file_to_file_up_to_its_limit(files: list[Path], asked: list[int]) -> None:
    limit = _SIZE + _SIZE // 4
    with read_ahead(files, limit):
        _wait()
    first, second, third = map(cached_bytes, files)
    # the system may have taken pages back, and it reads a little more than it is asked for
    assert first > _SIZE * 7 // 8
    assert _SIZE // 8 < second < _SIZE
    assert third == 0
    # the third piece finds the end of the first file
    assert asked == [_SIZE // 2, _SIZE // 2, _SIZE // 4, _SIZE // 4]


def test_reading_ahead_ends_with_its_block_which_does_not_wait(
    files: list[Path], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noting, begun, goes_on = os.sendfile, threading.Event(), threading.Event()
    stalled_until_told: list[bool] = []

    def stalling(out: int, source: int, offset: int, count: int) -> int:
        begun.set()
        stalled_until_told.append(goes_on.wait(60))
        return noting(out, source, offset, count)

    monkeypatch.setattr("os.sendfile", stalling)
    with pytest.raises(KeyError), read_ahead(files, 4 * _SIZE):
        assert begun.wait(60)
        raise KeyError
    goes_on.set()
    _wait()
    assert stalled_until_told == [True]  # the block was left while the system had not answered
    assert len(asked) == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_can_not_be_read_is_passed_over(files: list[Path], tmp_path: Path) -> None:
    with read_ahead([tmp_path / "absent", tmp_path, files[0]], _SIZE):
        _wait()
    assert cached_bytes(files[0]) > _SIZE // 2


def test_what_the_system_does_not_keep_is_not_read_on(
    files: list[Path], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FUSE: it drops a file's pages when the file is opened."""
    noting = os.sendfile

    def forgetting(out: int, source: int, offset: int, count: int) -> int:
        sent = noting(out, source, offset, count)
        forget(files[0])
        return sent

    monkeypatch.setattr("os.sendfile", forgetting)
    with read_ahead(files, 4 * _SIZE):
        _wait()
    assert len(asked) == 1


def test_no_file_is_written_where_the_null_device_should_be(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.devnull", str(tmp_path / "null"))
    with read_ahead(files, 4 * _SIZE):
        _wait()
    assert not (tmp_path / "null").exists()


def _wait() -> None:
    """Until reading ahead has come to its end."""
    for thread in threading.enumerate():
        if thread.name == "ftload-ahead":
            thread.join(60)
            assert not thread.is_alive()
