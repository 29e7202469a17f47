"""What is durable when: a machine that stops at any instant can't be had, the order of the system's calls can.

Each fsync is noted with what the file or directory held then: what is renamed, or entered in a journal, must hold the
same.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.errors import OutputError, ResourceError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.rebased import NamedBase, name_base
from ftload.loaders.write.file_copy import FileCopy
from ftload.loaders.write.staging import staged


def content(path: Path) -> str:
    """What would be lost if it were not durable: a file's bytes, or the names in a directory."""
    data = "\n".join(sorted(os.listdir(path))).encode() if path.is_dir() else path.read_bytes()  # noqa: PTH208
    return hashlib.sha256(data).hexdigest()


class Record:
    """The calls that make things durable, and what was done too early."""

    def __init__(self) -> None:
        self.durable: dict[int, set[str]] = {}
        """By inode: directories are renamed."""
        self.calls: list[tuple[str, Path]] = []
        self.journalled: set[str] = set()
        self.too_early: list[str] = []
        self._lock = threading.Lock()

    def is_durable(self, path: Path) -> bool:
        return content(path) in self.durable.get(path.stat().st_ino, ())

    def fsync(self, descriptor: int) -> None:
        FSYNC(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        with self._lock:
            self.calls.append(("fsync", path))
            self.durable.setdefault(path.stat().st_ino, set()).add(content(path))
            if path.name.startswith("journal-"):
                for entry in map(json.loads, path.read_text().splitlines()[1:]):
                    self.journalled.add(entry["path"])
                    if not self.is_durable(path.parent / "output" / entry["path"]):
                        self.too_early.append(f"journal: {entry['path']}")

    def rename(self, source: Path, target: Path) -> None:
        source, target = Path(source), Path(target)
        if source.name in ("output", "scratch-0"):  # what is about to count, and not what is put aside or deleted
            parts = [source, *source.rglob("*"), *source.parent.glob("journal-*")]
            self.too_early += [f"rename: {path.name}" for path in parts if not self.is_durable(path)]
        RENAME(source, target)
        self.calls.append(("rename", target))

    def replace(self, source: Path, target: Path) -> None:
        if not self.is_durable(Path(source)):
            self.too_early.append(f"replace: {source}")
        REPLACE(source, target)
        self.calls.append(("rename", Path(target)))

    def last(self, call: str, path: Path) -> int:
        return max((index for index, made in enumerate(self.calls) if made == (call, path)), default=-1)


FSYNC, RENAME, REPLACE = os.fsync, os.rename, os.replace


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    record = Record()
    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, getattr(record, name))
    return record


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run(model: Path, out: Path, *flags: str) -> None:
    words = ["--model", str(model), "--output_dir", str(out), "--lora_rank", "8", *flags]
    assert prepare(parse_arguments(words), Silent()) is not None


@pytest.mark.parametrize("flags", [["--use_lora", "--base", "copy"], ["--use_qlora", "--max_shard_size", "60KB"]])
def test_everything_is_durable_before_it_counts(record: Record, llama: Path, work: Path, flags: list[str]) -> None:
    out = work / "out"
    run(llama, out, *flags)
    assert record.too_early == []
    weights = {path.relative_to(out).as_posix() for path in out.rglob("*.safetensors")}
    assert record.journalled == weights
    assert len(weights) == (2 if "--use_lora" in flags else 3)
    assert record.last("fsync", work) > record.last("rename", out)

    run(llama, out, *flags, "--learning_rate", "1", "--hf_entity", "me")  # the report anew, and the card
    assert record.too_early == []
    replacing = record.last("rename", next(path for _, path in record.calls if path.name == "replacing"))
    assert ("fsync", record.calls[replacing][1].parent) in record.calls[replacing:]
    for name in ("README.md", "ftload_report.json"):
        assert replacing < record.last("rename", out / name) < record.last("fsync", out)


def test_another_base_is_durable_before_it_counts(record: Record, llama: Path, work: Path) -> None:
    out = work / "out"
    run(llama, out, "--use_lora", "--base", "copy")
    rebased = name_base(out, NamedBase(base="me/model"))
    assert rebased is not None
    assert record.too_early == []
    replacing = record.last("rename", next(path for _, path in record.calls if path.name == "replacing"))
    assert ("fsync", record.calls[replacing][1].parent) in record.calls[replacing:]
    for name in rebased.files:
        assert replacing < record.last("rename", out / name) < record.last("fsync", (out / name).parent)


def test_a_copy_counts_as_done_when_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    copy = FileCopy(tmp_path / "source", tmp_path / "target", 7, (), lambda count: None)
    hashed, early = threading.Event(), []

    def fsync(descriptor: int) -> None:
        early.append(hashed.wait(0.3))
        FSYNC(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(copy.hash)
        digest.add_done_callback(lambda _: hashed.set())
        copy.copy()
        assert digest.result(60) == hashlib.sha256(b"weights").hexdigest()
    assert early == [False]


# -- publishing and the lock


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_old_output_comes_back_when_the_new_one_can_not_be_put_in_its_place(
    llama: Path, work: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = work / "out"
    run(llama, out, "--use_lora")
    before = {path: path.stat() for path in out.rglob("*")}
    renamed = []

    def rename(source: Path, target: Path) -> None:
        renamed.append(Path(source).name)
        if Path(source).name == "output":
            raise OSError(number, os.strerror(number))
        RENAME(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ResourceError, match=f"can't write `{out}`: {os.strerror(number)}"):
        run(llama, out, "--use_lora", "--lora_alpha", "1", "--overwrite")
    assert renamed[:3] == ["out", "output", "replaced"]
    assert {path: path.stat() for path in out.rglob("*")} == before


def held(lock: Path) -> bool:
    """Whether some process holds the lock."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_lock_is_held_until_the_place_is_gone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else another process takes it, and what it makes is deleted."""
    seen = []

    def rename(source: Path, target: Path) -> None:
        seen.append((Path(source).name, held(Path(source) / "lock")))
        RENAME(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with staged(work / "out") as place:
        name = place.directory.name
    assert seen == [(name, True)]
    assert list(work.iterdir()) == []


def test_a_lock_whose_file_is_gone_holds_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its holder removes the place, and a third process makes it again."""
    flock, third = fcntl.flock, None

    def late(file: Any, how: int) -> None:
        nonlocal third
        monkeypatch.setattr(fcntl, "flock", flock)
        (directory,) = work.iterdir()
        (directory / "lock").unlink()
        directory.rmdir()
        third = staged(work / "out")
        third.__enter__()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="is being prepared by another process"), staged(work / "out"):
        pass
    assert third is not None
    third.__exit__(None, None, None)
    assert list(work.iterdir()) == []
