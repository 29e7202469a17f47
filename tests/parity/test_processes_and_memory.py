"""The bytes are the same for every number of processes and every memory budget; any failure fails all."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from ftload.loaders.errors import ResourceError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.write import processes
from ftload.loaders.write.processes import Processes
from torch.distributed import HashStore

from ..cli.runs import ENDLESS, wait_for_file
from ..tokenizers import write_llama
from .models import write_model

FLAGS = ["--use_qlora", "--lora_rank", "8", "--max_shard_size", "30KB", "--embedding_init", "reference", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_model(directory, "llama", vocab_size=128, dtype="bfloat16", shards=True)
    write_llama(directory, vocab_size=128)
    return directory


@pytest.fixture(scope="module")
def hashes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    prepare(parse_arguments(["--model", str(source), "--output_dir", str(out), *FLAGS]), Silent())
    return hash_all(out)


def hash_all(directory: Path) -> dict[str, str]:
    """sha256 of every file but the report and what names the output's own path."""
    differing = {"ftload_report.json", "adapter/adapter_config.json"}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and (name := path.relative_to(directory).as_posix()) not in differing
    }


def start(
    count: int, *words: str | Path, spoilt_rank: int | None = None, endless_rank: int | None = None
) -> list[subprocess.Popen[str]]:
    """The processes as `torchrun --nproc-per-node` starts them; that of `endless_rank` never ends by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        program = ["-c", ENDLESS] if rank == endless_rank else ["-m", "ftload.cli"]
        command = [sys.executable, *program, "prepare", *map(str, words)]
        if rank == spoilt_rank:
            command += ["--max_memory", "1KB"]
        started.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return started


def test_three_processes_write_what_one_writes(source: Path, hashes: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = start(3, "--model", source, "--output_dir", out, *FLAGS, "--json")
    results = [(*process.communicate(timeout=600), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [0, 0, 0], results
    assert [bool(stdout) for stdout, _, _ in results] == [True, False, False]
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert hash_all(out) == hashes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_one_process_that_fails_fails_all_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    processes = start(2, "--model", source, "--output_dir", tmp_path / "out", *FLAGS, spoilt_rank=1)
    results = [(*process.communicate(timeout=600), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [6, 6], results
    assert results[0][1].startswith("error: process 1 failed: tensor `")
    assert results[1][1].startswith("error: tensor `")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_told_of_by_all(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    for written in (False, True):
        if written:  # by another request
            (tmp_path / "out/mine").rename(tmp_path / "out/ftload_report.json")
            (tmp_path / "out/ftload_report.json").write_text("{}")
        processes = start(2, "--model", source, "--output_dir", tmp_path / "out", *FLAGS)
        results = [(*process.communicate(timeout=600), process.returncode) for process in processes]
        assert [code for _, _, code in results] == [8, 8], results
        assert all("exists and is not empty" in err for _, err, _ in results), results
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_first_process_is_killed(source: Path, tmp_path: Path) -> None:
    first, second = start(2, "--model", source, "--output_dir", tmp_path / "out", "--use_lora", endless_rank=0)
    wait_for_file(tmp_path, "*.safetensors", first)
    first.kill()
    first.communicate(timeout=600)
    _, err = second.communicate(timeout=600)
    assert second.returncode == 6
    assert err.startswith("error: the other processes can't be reached: ")


class Clock:
    """Time that passes when somebody sleeps, and then alone; at each second something may happen."""

    def __init__(self, patch: pytest.MonkeyPatch, each_second: Callable[[int], object]) -> None:
        self.now = 0.0
        self._each_second = each_second
        patch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        if int(self.now) > int(before):
            self._each_second(int(self.now))


def test_a_killed_process_is_noticed_by_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    clock = Clock(monkeypatch, lambda second: second < 10 and store.add("alive 1", 1))
    waiting = Processes(rank=0, count=2, store=store)
    with (
        pytest.raises(ResourceError, match="process 1 has given no sign of life for 60 s"),
        waiting.failing_together(),
    ):
        waiting.gather("written", {})
    assert 69 < clock.now < 69 + 1 + 30 + 1  # since the last sign; then it is not waited for as long


def test_a_slow_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()

    def work_slowly(second: int) -> None:
        if second % 50 == 0:
            store.add("alive 1", 1)
        if second == 500:
            store.set("done 1", "1")
            store.set("left 1", "true")

    clock = Clock(monkeypatch, work_slowly)
    waiting = Processes(rank=0, count=2, store=store)
    with waiting.failing_together():
        assert waiting.gather("done", 0) == [0, 1]
    assert 500 <= clock.now < 502


def test_a_process_at_work_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BEAT_SECONDS", 0.01)
    store, enough = HashStore(), threading.Event()

    class Counting:
        """A store that counts signs of life."""

        signs = 0

        def add(self, key: str, count: int) -> int:
            assert (key, count) == ("alive 1", 1)
            self.signs += 1
            if self.signs == 3:
                enough.set()
            return store.add(key, count)

        def set(self, key: str, value: str) -> None:
            store.set(key, value)

    with Processes(rank=1, count=2, store=Counting()).failing_together():
        assert enough.wait(60)
    assert store.check(["left 1"])


@pytest.mark.parametrize("budget", ["64MB", "1MB"])
def test_every_budget_gives_the_same_bytes(source: Path, hashes: dict[str, str], tmp_path: Path, budget: str) -> None:
    words = ["--model", str(source), "--output_dir", str(tmp_path / "out"), *FLAGS, "--max_memory", budget]
    outcome = prepare(parse_arguments(words), Silent())
    assert outcome is not None
    assert outcome.report.memory_budget_bytes == int(budget[:-2]) * 10**6
    assert hash_all(tmp_path / "out") == hashes


def test_a_budget_that_one_tensor_exceeds_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    words = ["--model", str(source), "--output_dir", str(tmp_path / "out"), *FLAGS, "--max_memory", "10KB"]
    with pytest.raises(
        ResourceError, match=r"tensor `.*` needs .* bytes at once, `--max_memory` allows 10,000"
    ) as raised:
        prepare(parse_arguments(words), Silent())
    assert list(tmp_path.iterdir()) == []
    enough = re.fullmatch(r"pass --max_memory (\w+) or more", raised.value.hint or "")
    assert enough is not None
    assert prepare(parse_arguments([*words[:-1], enough[1]]), Silent()) is not None
