"""The place where an output is made: up to date, in use, damaged, continued, and disks that fail in the middle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED
from itertools import groupby
from pathlib import Path

import pytest
from ftload.loaders.errors import ResourceError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.system.durable import disk_errors
from ftload.loaders.write import fingerprint as identity

from ..conftest import Result
from ..parity.models import write_model
from ..small_disk import small_disk
from ..tokenizers import write_llama

Ftload = Callable[..., Result]
FLAGS = ["--use_qlora", "--lora_rank", "8", "--max_shard_size", "30KB"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    write_model(directory, "llama", vocab_size=136, dtype="bfloat16")
    write_llama(directory, vocab_size=128)
    return directory


@pytest.fixture
def work(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_the_same_request_again_is_up_to_date_at_once(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS]
    first = ftload(*words, "--json")
    assert first.code == 0, first.err
    before = times(work)
    again = ftload(*words, "--json")
    assert (again.code, again.out) == (0, first.out)
    # flags that have no part in the result, --overwrite included, change nothing
    shown = ftload(*words, "--overwrite", "--strict", "false", "--max_memory", "1GB")
    assert shown.code == 0
    assert "up to date" in shown.out.splitlines()[0]
    assert times(work) == before
    assert [path.name for path in work.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: ["--lora_rank", "4"], id="argument"),
        pytest.param(lambda model: (os.utime(model / "model.safetensors", (1, 1)), [])[1], id="weights"),
        pytest.param(lambda model: (os.utime(model / "tokenizer.json", (1, 1)), [])[1], id="tokenizer"),
        pytest.param(lambda model: ["--chat_template_name", str(model / "own.jinja")], id="template"),
    ],
)
def test_another_request_is_not(ftload: Ftload, model: Path, work: Path, change: Callable[[Path], list[str]]) -> None:
    (model / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    words = ["prepare", "--model", model, "--output_dir", work / "out", "--use_lora", "--base", "copy"]
    assert ftload(*words).code == 0
    words += change(model)
    refused = ftload(*words)
    assert refused.code == 8
    assert "exists and is not empty" in refused.err
    replaced = ftload(*words, "--overwrite", "--json")
    assert replaced.code == 0
    assert json.loads(replaced.out) == json.loads((work / "out/ftload_report.json").read_text())


def test_an_edited_template_file_is_another_request(ftload: Ftload, model: Path, work: Path) -> None:
    """Even where its size and its time of modification stay as they were."""
    template = work / "own.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    words = ["prepare", "--model", model, "--output_dir", work / "out", "--use_lora", "--chat_template_name", template]
    assert ftload(*words).code == 0
    assert "up to date" in ftload(*words).out.splitlines()[0]
    before = template.stat()
    template.write_text("{% for n in messages %}{{ n['content'] }}{{ eos_token }}{% endfor %}")
    os.utime(template, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert template.stat().st_size == before.st_size
    assert ftload(*words).code == 8
    assert ftload(*words, "--overwrite").code == 0
    assert (work / "out/chat_template.jinja").read_text() == template.read_text()


@pytest.mark.parametrize("what", ["versions", "ftload_version"])
def test_other_versions_are_another_request(
    ftload: Ftload, model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", "--use_lora"]
    assert ftload(*words).code == 0
    newer = {"versions": {"torch": "99.0"}, "ftload_version": "99.0"}[what]
    monkeypatch.setattr(identity, what, lambda: newer)
    refused = ftload(*words)
    assert refused.code == 8
    assert "exists and is not empty" in refused.err


def test_a_damaged_output_is_not_up_to_date(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS]
    assert ftload(*words).code == 0
    shard = next((work / "out").glob("model-00001*"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused = ftload(*words)
    assert refused.code == 8
    assert f"`{shard.name}` is not as it was written" in refused.err
    assert ftload(*words, "--overwrite").code == 0
    assert shard.read_bytes() == good


def test_overwriting_spares_what_somebody_else_put_there(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", "--overwrite"]
    assert ftload(*words, *FLAGS).code == 0
    checkpoint, hidden, link = (work / "out" / name for name in ("checkpoint-100/weights", ".git/HEAD", "logs"))
    for path in (checkpoint, hidden):
        path.parent.mkdir()
        path.write_text("mine")
    link.symlink_to(model)
    for path in (hidden, checkpoint, link):
        before = times(work)
        refused = ftload(*words, "--use_lora")
        assert refused.code == 8
        name = path.relative_to(work / "out").as_posix()
        assert f"holds `{name}`, which ftload did not write\nhint: move it away" in refused.err
        assert times(work) == before
        path.unlink()
    assert ftload(*words, "--use_lora").code == 0


def test_strict_holds_for_what_is_up_to_date(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS]
    assert ftload(*words).code == 0
    assert ftload(*words, "--strict").code == 5  # FlashAttention was asked for
    assert (work / "out/ftload_report.json").exists()


def test_an_output_in_use_is_refused(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS]

    class Second(Silent):
        result: Result | None = None

        def stage(self, name: str) -> None:
            if name == "write":
                self.result = ftload(*words)

    progress = Second()
    prepare(parse_arguments([str(word) for word in words[1:]]), progress)
    assert progress.result is not None
    assert progress.result.code == 8
    assert f"`{work / 'out'}` is being prepared by another process" in progress.result.err
    assert [path.name for path in work.iterdir()] == ["out"]


class _Killed(BaseException):
    pass


def kill_when(model: Path, out: Path, finished: int, flags: list[str]) -> None:
    """Run in a process of its own, which dies once so many files are finished."""
    program = f"""
import os, sys
import ftload.loaders.write.staging as staging
add = staging.Journal.add
left = {finished}
def dying(self, path, sha256):
    global left
    add(self, path, sha256)
    left -= 1
    if not left:
        os._exit(9)
staging.Journal.add = dying
from ftload.cli.app import main
main()
"""
    words = ["prepare", "--model", model, "--output_dir", out, *flags, "--quiet"]
    done = subprocess.run([sys.executable, "-c", program, *words], check=False, timeout=600)
    assert done.returncode == 9


def test_finished_files_are_proven_not_trusted(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS]
    assert ftload(*words).code == 0
    expected = {path.name: path.read_bytes() for path in (work / "out").glob("*.safetensors")}
    shutil.rmtree(work / "out")
    kill_when(model, work / "out", 4, FLAGS)
    (staging,) = work.iterdir()
    finished = sorted((staging / "output").glob("*.safetensors"))
    spoilt = finished[0]
    data = spoilt.read_bytes()
    spoilt.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (staging / "output" / "model-99999-of-99999.safetensors").write_bytes(b"a stale shard")
    assert ftload(*words).code == 0
    assert {path.name: path.read_bytes() for path in (work / "out").glob("*.safetensors")} == expected


def test_other_arguments_start_afresh(ftload: Ftload, model: Path, work: Path) -> None:
    kill_when(model, work / "out", 3, FLAGS)
    flags = [*FLAGS[:-1], "60KB"]
    assert ftload("prepare", "--model", model, "--output_dir", work / "out", *flags).code == 0
    fresh = ftload("prepare", "--model", model, "--output_dir", work / "fresh", *flags, "--json")
    names = {entry["path"] for entry in json.loads(fresh.out)["files"]}
    assert {p.relative_to(work / "out").as_posix() for p in (work / "out").rglob("*") if p.is_file()} == {
        *names, "ftload_report.json",
    }  # fmt: skip
    assert sorted(path.name for path in work.iterdir()) == ["fresh", "out"]


def test_an_output_that_was_put_aside_comes_back(ftload: Ftload, model: Path, work: Path) -> None:
    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS]
    assert ftload(*words).code == 0
    kill_when(model, work / "out", 1, ["--overwrite", "--use_lora", "--base", "copy"])
    (staging,) = work.glob(".out.*")
    (work / "out").rename(staging / "replaced")  # killed between the two renames
    assert ftload(*words).code == 0
    assert [path.name for path in work.iterdir()] == ["out"]


def test_the_lock_is_on_the_output_not_on_its_name(ftload: Ftload, model: Path, work: Path) -> None:
    """Long names that begin alike have places of their own."""
    long = "n" * 200
    kill_when(model, work / f"{long}a", 1, FLAGS)
    (staging,) = work.iterdir()
    with (staging / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ftload("prepare", "--model", model, "--output_dir", work / f"{long}b", *FLAGS).code == 0
        assert ftload("prepare", "--model", model, "--output_dir", work / f"{long}a", *FLAGS).code == 8


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory."""
    with small_disk(tmp_path / "disk", "8m") as directory:
        yield directory


class Filling(Silent):
    """Fills the disk when a stage begins, but for so many bytes."""

    def __init__(self, disk: Path, stage: str, free: int) -> None:
        self._disk, self._stage, self._free = disk, stage, free

    def stage(self, name: str) -> None:
        if name == self._stage:
            fill(self._disk, self._free)


def fill(disk: Path, free: int) -> None:
    size = shutil.disk_usage(disk).free // 4096 * 4096 - free
    (disk / "filler").write_bytes(bytes(size))


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one worker, files are written in the plan's order; that one failed is seen when all later ones have, too."""
    monkeypatch.setattr("ftload.loaders.plan.planning.count_workers", lambda: 1)
    monkeypatch.setattr("ftload.loaders.write.stream.FIRST_EXCEPTION", ALL_COMPLETED)


@pytest.mark.usefixtures("one_worker")
def test_a_full_disk_at_every_file(ftload: Ftload, model: Path, disk: Path) -> None:
    out = disk / "out"
    words = ["--model", str(model), "--output_dir", str(out), *FLAGS]
    done = ftload("prepare", *words, "--json")
    assert done.code == 0, done.err
    expected = {entry["path"]: entry["sha256"] for entry in json.loads(done.out)["files"]}
    whole = sum(path.stat().st_blocks * 512 for path in out.rglob("*"))
    shutil.rmtree(out)
    hit: list[str] = []
    kept: set[str] = set()
    for stage, step in (("write", 16384), ("save", 4096)):
        for free in range(0, whole, step):
            try:
                prepare(parse_arguments(words), Filling(disk, stage, free))
            except ResourceError as error:
                assert error.code == 6
                assert "No space left on device" in error.message, error.message
                hit.append(error.message.split("`")[1].rpartition("/")[2])
                assert not out.exists()
                kept |= {path.name for path in disk.rglob("*.safetensors")}
            (disk / "filler").unlink(missing_ok=True)
            # with room again, the run goes on from what is finished, or finds everything done
            again = ftload("prepare", *words, "--json")
            assert again.code == 0, again.err
            found = {entry["path"]: entry["sha256"] for entry in json.loads(again.out)["files"]}
            assert found == {**expected, "README.md": found["README.md"]}
            assert [path.name for path in disk.iterdir()] == ["out"]
            shutil.rmtree(out)
    weights = {Path(name).name for name in expected if name.endswith(".safetensors")}
    assert weights <= set(hit), weights - set(hit)
    # the more room, the later the file that is told: of several that fail, it is the first
    assert [name for name, _ in groupby(hit)] == list(dict.fromkeys(hit))
    # each was among the finished ones that stayed, once it was the side files that found no room
    assert kept == weights


def test_too_little_room_is_known_before_the_first_byte(ftload: Ftload, model: Path, disk: Path) -> None:
    fill(disk, 100_000)
    before = times(disk)
    refused = ftload("prepare", "--model", model, "--output_dir", disk / "out", *FLAGS)
    assert refused.code == 6
    assert "GB free, the output takes" in refused.err
    assert times(disk) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_what_a_failing_disk_says_is_told_with_the_file(number: int) -> None:
    """A file system can't be made read-only while a process writes there; the system's errors can be had directly."""
    with pytest.raises(ResourceError) as raised, disk_errors(Path("/out/model.safetensors")):
        raise OSError(number, os.strerror(number))
    assert raised.value.message == f"can't write `/out/model.safetensors`: {os.strerror(number)}"


@pytest.mark.parametrize("limit", [0, 5_000, 20_000, 30_000])
def test_a_limit_on_the_size_of_files(model: Path, work: Path, limit: int) -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["prepare", "--model", model, "--output_dir", work / "out", *FLAGS, "--json"]
    command = [sys.executable, "-m", "ftload.cli", *map(str, words)]
    done = subprocess.run(command, preexec_fn=lower, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 6, done.stderr
    assert "File too large" in json.loads(done.stdout)["error"]["message"]
    assert not (work / "out").exists()
