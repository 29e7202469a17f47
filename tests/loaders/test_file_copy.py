"""Files taken over whole: linked or copied, hashed on the way, and never waited for in vain."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.errors import CheckpointError, SourceError
from ftload.loaders.write.file_copy import FileCopy

from ..small_disk import small_disk

CONTENT = bytes(range(256)) * 150_000  # 38 MB: more than one piece


def copy_of(tmp_path: Path, size: int = len(CONTENT)) -> FileCopy:
    (tmp_path / "source").write_bytes(CONTENT)
    return FileCopy(tmp_path / "source", tmp_path / "target", size, (), lambda count: None)


@pytest.mark.parametrize("how", ["copy", "link"])
def test_content_and_hash(tmp_path: Path, how: str) -> None:
    copy = copy_of(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        digest = pool.submit(copy.hash)
        pool.submit(getattr(copy, how)).result(60)
        assert digest.result(60) == hashlib.sha256(CONTENT).hexdigest()
    assert copy.target.read_bytes() == CONTENT
    assert copy.target.samefile(tmp_path / "source") == (how == "link")


def received(path: Path) -> Callable[[memoryview, int], None]:
    """Reads a file for `FileCopy.receive`."""
    content = path.read_bytes()

    def read(view: memoryview, begin: int) -> None:
        view[:] = content[begin : begin + len(view)]

    return read


def test_what_comes_from_elsewhere_is_hashed_on_its_way(tmp_path: Path) -> None:
    copy = copy_of(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        digest = pool.submit(copy.hash)
        pool.submit(copy.receive, received(tmp_path / "source")).result(60)
        assert digest.result(60) == hashlib.sha256(CONTENT).hexdigest()
    assert copy.target.read_bytes() == CONTENT


def test_what_is_said_to_have_come_is_in_the_file(tmp_path: Path) -> None:
    """Who follows reads as far as is told."""
    sizes: list[int] = []
    size = 1024 * 1024 + 100
    (tmp_path / "source").write_bytes(CONTENT[:size])
    target = tmp_path / "target"
    copy = FileCopy(tmp_path / "source", target, size, (), lambda count: sizes.append(target.stat().st_size))
    copy.receive(received(tmp_path / "source"))
    assert sizes == [1024 * 1024, size]


def test_what_comes_from_elsewhere_and_finds_no_room_is_an_error(tmp_path: Path) -> None:
    """The disk ends within the last piece: the system writes what it has room for, and says so by a number alone."""
    size = 3 * 1024 * 1024
    (tmp_path / "source").write_bytes(CONTENT[:size])
    with small_disk(tmp_path / "disk", "2560k") as disk:
        copy = FileCopy(tmp_path / "source", disk / "target", size, (), lambda count: None)
        with pytest.raises(OSError) as caught:
            copy.receive(received(tmp_path / "source"))
        assert caught.value.errno == errno.ENOSPC
        assert copy.hash() == ""


@pytest.mark.parametrize("element", [0, 2**19 - 1, 2**19, 2_000_000])
def test_what_is_hashed_is_looked_at(tmp_path: Path, element: int) -> None:
    """The first and last element of a piece, and of a tensor that begins at an odd byte; integers may be anything."""
    begin = 1001
    values = torch.ones(2_000_001, dtype=torch.bfloat16)
    values[element] = float("nan")
    data = values.view(torch.uint8).numpy().tobytes()
    content = b"\xff" * begin + data + b"\xff" * 5001
    (tmp_path / "source").write_bytes(content)
    metas = [
        TensorMeta(name=name, shape=shape, dtype=dtype, file="source", begin=first, end=end)
        for name, shape, dtype, first, end in [
            ("integers", (5001,), "I8", begin + len(data), len(content)),
            ("floats", (2_000_001,), "BF16", begin, begin + len(data)),
            ("nothing", (0,), "BF16", begin, begin),
        ]
    ]
    for tensors in (metas, metas[:1]):
        copy = FileCopy(tmp_path / "source", tmp_path / f"target{len(tensors)}", len(content), tensors, lambda _: None)
        copy.copy()
        if tensors is metas:
            with pytest.raises(CheckpointError, match=r"^tensor `floats` of `source` holds NaN or infinity$"):
                copy.hash()
        else:
            assert copy.hash() == hashlib.sha256(content).hexdigest()


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
    copy = FileCopy(tmp_path / "source", tmp_path / "target", len(CONTENT), (), stop)
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
