"""Files taken over whole: linked or copied, hashed on the way, and never waited for in vain."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ftload.loaders.errors import CheckpointError, SourceError
from ftload.loaders.file_copy import FileCopy

CONTENT = bytes(range(256)) * 150_000  # 38 MB: more than one piece


def copy_of(tmp_path: Path, size: int = len(CONTENT)) -> FileCopy:
    (tmp_path / "source").write_bytes(CONTENT)
    return FileCopy(tmp_path / "source", tmp_path / "target", size, lambda count: None)


@pytest.mark.parametrize("how", ["copy", "link"])
def test_content_and_hash(tmp_path: Path, how: str) -> None:
    copy = copy_of(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        digest = pool.submit(copy.hash)
        pool.submit(getattr(copy, how)).result(60)
        assert digest.result(60) == hashlib.sha256(CONTENT).hexdigest()
    assert copy.target.read_bytes() == CONTENT
    assert copy.target.samefile(tmp_path / "source") == (how == "link")


def test_where_the_kernel_can_not_copy_little_is_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    held: list[int] = []
    read = os.pread

    def noting(descriptor: int, count: int, offset: int) -> bytes:
        data = read(descriptor, count, offset)
        held.append(len(data))
        return data

    monkeypatch.setattr("os.copy_file_range", refuse)
    monkeypatch.setattr("os.pread", noting)
    copy = copy_of(tmp_path)
    copy.copy()
    assert copy.hash() == hashlib.sha256(CONTENT).hexdigest()
    assert copy.target.read_bytes() == CONTENT
    assert sum(held) == len(CONTENT)
    assert max(held) == 2**20


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_source_that_became_shorter_ends_both(tmp_path: Path, how: str) -> None:
    copy = copy_of(tmp_path, size=len(CONTENT) + 1)
    with ThreadPoolExecutor(2) as pool:
        digest = pool.submit(copy.hash)
        copied = pool.submit(getattr(copy, how))
        errors = [copied.exception(60), digest.exception(60)]
    assert any(isinstance(error, CheckpointError) for error in errors), errors


@pytest.mark.parametrize("how", ["copy", "link"])
def test_who_is_told_to_stop_lets_the_hash_go(tmp_path: Path, how: str) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "source").write_bytes(CONTENT)
    copy = FileCopy(tmp_path / "source", tmp_path / "target", len(CONTENT), stop)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(copy.hash)
        with pytest.raises(KeyboardInterrupt):
            getattr(copy, how)()
        assert digest.result(60) == ""


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    copy = copy_of(tmp_path)
    (tmp_path / "source").unlink()
    with pytest.raises(SourceError, match=f"can't read `{tmp_path / 'source'}`"):
        copy.copy()
