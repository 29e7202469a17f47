"""What carries a plan out: within the memory that was promised, and what came of it is compared with the plan."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from ftload.loaders.checkpoint.checkpoint import SINGLE_FILE
from ftload.loaders.errors import VerificationError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.nf4 import encode as nf4
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent, Stopwatch
from ftload.loaders.steps.step import Inputs, Operation, Sink
from ftload.loaders.write.stream import write_tensors
from ftload.loaders.write.written import Written

from .plans import make_plan


def needs(operations: list[Operation], chunk_bytes: int) -> list[int]:
    return sorted(operation.memory(chunk_bytes) for operation in operations)


@pytest.mark.parametrize("workers", [1, 2, 3, 1000])
def test_a_plan_needs_what_its_largest_steps_need_beside_each_other(llama: Path, tmp_path: Path, workers: int) -> None:
    plan, _ = make_plan(llama, tmp_path, "--use_qlora")
    plan = replace(plan, workers=workers)
    all_needs = needs([step.operation for file in plan.files for step in file.steps], plan.chunk_bytes)
    assert plan.memory_bytes == sum(all_needs[-workers:]) < plan.request.max_memory_bytes
    assert (plan.memory_bytes > all_needs[-1]) == (workers > 1)
    least = replace(plan, request=replace(plan.request, max_memory_bytes=all_needs[-1]))
    assert least.memory_bytes == all_needs[-1]


@dataclass
class Watch:
    """What the steps that are running have been promised."""

    patience: float
    """Seconds for which a step waits for another one to begin beside it, until two have been seen."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    running: list[int] = field(default_factory=list)
    most: int = 0
    most_at_a_time: int = 0


@dataclass
class Watched:
    """An operation that gives others the time to begin beside it, if they may."""

    operation: Operation
    watch: Watch

    def memory(self, chunk_bytes: int) -> int:
        return self.operation.memory(chunk_bytes)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        need, watch = self.memory(inputs.chunk_bytes), self.watch
        with watch.changed:
            watch.running.append(need)
            watch.most = max(watch.most, sum(watch.running))
            watch.most_at_a_time = max(watch.most_at_a_time, len(watch.running))
            watch.changed.notify_all()
            watch.changed.wait_for(lambda: watch.most_at_a_time > 1, watch.patience)
        self.operation.run(inputs, sink)
        with watch.changed:
            watch.running.remove(need)


def write_watched(model: Path, work: Path, *, within: bool, workers: int) -> tuple[Watch, int]:
    """Write a plan with so many workers, and within the bytes that its largest step needs or not; returns these too."""
    plan, _ = make_plan(model, work, "--use_qlora", "--lora_rank", "8")
    operations = [step.operation for file in plan.files for step in file.steps]
    largest = needs(operations, plan.chunk_bytes)[-1]
    budget = largest if within else plan.request.max_memory_bytes
    ahead = 10_000_000 if within else 0  # what is read ahead of a hub has its share
    request = replace(plan.request, max_memory_bytes=budget + ahead)
    plan = replace(plan, workers=workers, read_ahead_bytes=ahead, request=request)
    watch = Watch(patience=0.02 if within else 60)
    files = tuple(
        replace(file, steps=tuple(replace(step, operation=Watched(step.operation, watch)) for step in file.steps))
        for file in plan.files
    )
    stage = work / "stage"
    (stage / "adapter").mkdir(parents=True)
    write_tensors(plan, files, nf4.encode, stage, Stopwatch(Silent()), lambda file, digest: None)
    assert watch.running == []
    assert sorted(path.stat().st_size for path in stage.rglob("*.safetensors")) == sorted(f.size for f in files)
    return watch, largest


@pytest.mark.parametrize("workers", [4, 64])
def test_what_runs_at_a_time_stays_within_the_budget(llama: Path, tmp_path: Path, workers: int) -> None:
    watch, largest = write_watched(llama, tmp_path, within=True, workers=workers)
    assert watch.most == largest


@pytest.mark.parametrize("workers", [4, 64])
def test_with_room_steps_run_beside_each_other(llama: Path, tmp_path: Path, workers: int) -> None:
    watch, _ = write_watched(llama, tmp_path, within=False, workers=workers)
    assert watch.most_at_a_time > 1


# -- what was written is read back


def test_a_copy_that_is_not_what_was_planned_is_refused(llama: Path, tmp_path: Path) -> None:
    """The source changed after its headers were read, and size and time of modification don't tell."""
    model = Path(shutil.copytree(llama, tmp_path / "source" / "model"))
    weights = model / SINGLE_FILE

    class Changing(Silent):
        def stage(self, name: str) -> None:
            if name == "write":
                found = weights.stat()
                weights.write_bytes(weights.read_bytes().replace(b'"model.norm.weight"', b'"model.form.weight"'))
                os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))

    words = ["--model", str(model), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(VerificationError, match=r"`model\.safetensors` is not what was planned"):
        prepare(parse_arguments(words), Changing())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (b'"model.norm.weight"', b'"model.form.weight"', "`model.safetensors` is not what was planned"),
        (b'"U8","shape":[96]', b'"I8","shape":[96]', "of `model.safetensors` is not what was planned"),
        (b'[144,64]', b'[64,144]', "tensor `.*` of `model.safetensors` is not what was planned"),
    ],
)  # fmt: skip
def test_a_disk_that_holds_another_header_is_noticed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bytes, bad: bytes, message: str
) -> None:
    fsync = os.fsync

    def spoil(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == SINGLE_FILE:
            content = path.read_bytes()
            assert good in content
            path.write_bytes(content.replace(good, bad, 1))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spoil)
    words = ["--model", str(llama), "--output_dir", str(tmp_path / "out"), "--use_qlora", "--lora_rank", "8"]
    with pytest.raises(VerificationError, match=message):
        prepare(parse_arguments(words), Silent())
    assert list(tmp_path.iterdir()) == []


def test_the_shares_of_several_processes_are_added_up() -> None:
    """A file that two of them read whole, one to copy it and one for an adapter, is named once."""
    shares = [
        {
            "hashes": {"b": "1"},
            "seconds": {"read": 1.0},
            "peak_anonymous_bytes": 7,
            "ranges_bytes": 10,
            "compared": ["y"],
        },
        {
            "hashes": {"a": "2"},
            "seconds": {"read": 2.5},
            "peak_anonymous_bytes": 9,
            "ranges_bytes": 5,
            "compared": ["x", "y"],
        },
    ]
    assert Written.all_of(shares) == Written(
        hashes={"a": "2", "b": "1"}, seconds={"read": 3.5}, peak_anonymous_bytes=9, ranges_bytes=15, compared=("x", "y")
    )
