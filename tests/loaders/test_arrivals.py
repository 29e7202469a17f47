"""Files that come from a hub while the first of them are worked on: how many at once, in which order, who is told what.

No test waits for time to pass: rates are given, and events say when a file has come.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from ftload.loaders.errors import CheckpointError, SourceError
from ftload.loaders.progress import Silent, Stopwatch
from ftload.loaders.source.arrivals import Arrivals, Pace
from ftload.loaders.source.source import Source, SourceFile
from ftload.loaders.write.stream import in_order, write_tensors

from ..conftest import ROWS
from ..parity.models import write_model
from ..tokenizers import write_llama
from .plans import make_plan

GUARD_SECONDS = 60
"""After which a test that would hang fails."""


# -- how many at once


def paces(rate: Callable[[int], float], seconds: int = 60) -> list[int]:
    """How many files travel, each time that changes, where so many together are so fast."""
    pace, arrived, found = Pace(), 0.0, []
    for tick in range(seconds * 10):
        count = pace.at(tick / 10, int(arrived))
        if found[-1:] != [count]:
            found.append(count)
        arrived += rate(count) / 10
    return found


def test_on_a_line_that_all_share_two_files_travel() -> None:
    assert paces(lambda count: 50e6) == [2, 3, 2]


def test_where_each_connection_is_limited_more_travel_up_to_eight() -> None:
    assert paces(lambda count: 50e6 * count) == [2, 3, 4, 5, 6, 7, 8]


def test_as_many_travel_as_make_it_faster() -> None:
    assert paces(lambda count: 50e6 * min(count, 3)) == [2, 3, 4, 3]
    assert paces(lambda count: 50e6 * (2 + 0.4 * (count - 2))) == [2, 3, 2]  # the third brings less than half
    assert paces(lambda count: 50e6 * (2 + 0.6 * (count - 2))) == [2, 3, 4, 5, 6, 7, 8]


def test_a_rate_counts_once_the_connection_is_at_full_speed() -> None:
    """What comes in the first second after a change has no part in it."""
    pace = Pace()
    assert [pace.at(seconds, arrived) for seconds, arrived in ((5.0, 0), (5.9, 900), (6.0, 900), (6.9, 1000))] == [
        2
    ] * 4
    assert pace.at(7.0, 1000) == 3  # 100 a second, not 500
    assert [pace.at(seconds, arrived) for seconds, arrived in ((7.9, 1000), (8.0, 1500), (8.9, 1624))] == [3] * 3
    assert pace.at(9.0, 1624) == 2  # 124 a second, of which the third file brings less than half of 50
    assert pace.at(99.0, 10**9) == 2  # for good


# -- who asks for which file, and who is told


@dataclass(frozen=True, kw_only=True)
class Gated(Source):
    """A hub whose files come when they are let come, out of `behind`; it records which were asked for."""

    behind: Path
    asked: list[str] = field(default_factory=list)
    here: dict[str, threading.Event] = field(default_factory=dict)
    failing: dict[str, Exception] = field(default_factory=dict)
    pieces: int = 4

    def fetch(self, names: Iterable[str], on_progress: Callable[[int], None] | None = None) -> None:
        assert on_progress is not None
        for name in names:
            self.asked.append(name)
            data = (self.behind / name).read_bytes()
            for piece in range(self.pieces):
                begin, end = (len(data) * place // self.pieces for place in (piece, piece + 1))
                on_progress(end - begin)
                if piece == 0:
                    assert self.here[name].wait(GUARD_SECONDS)
                    if name in self.failing:
                        raise self.failing[name]
            (self.root / name).write_bytes(data)

    def let_come(self, *names: str) -> None:
        for name in names:
            self.here[name].set()


def behind_a_gate(model: Path, cache: Path, *, here: Iterable[str] = ()) -> Gated:
    """The files of a model as of a hub; some of them are in the cache already."""
    cache.mkdir()
    names = sorted(path.name for path in model.iterdir())
    for name in here:
        shutil.copy(model / name, cache / name)
    return Gated(
        model="org/model",
        kind="hub",
        revision=None,
        commit="0" * 40,
        root=cache,
        files=tuple(SourceFile(path=name, bytes=(model / name).stat().st_size, sha256=None) for name in names),
        behind=model,
        here={name: threading.Event() for name in names},
    )


class Recorded(Silent):
    """Progress that keeps what arrived; whoever waits for something to happen is woken by what is told."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, int]] = []
        self.tensors = 0
        self.changed = threading.Condition()

    def advance(self, *, bytes: int, tensors: int) -> None:
        with self.changed:
            self.tensors += tensors
            self.changed.notify_all()

    def arriving(self, *, bytes: int, of: int) -> None:
        with self.changed:
            self.arrived.append((bytes, of))
            self.changed.notify_all()

    def until(self, happened: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(happened, GUARD_SECONDS)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Files a to d, of 100, 200, 300 and 400 bytes."""
    directory = tmp_path / "letters"
    directory.mkdir()
    for place, name in enumerate("abcd"):
        (directory / name).write_bytes(name.encode() * 100 * (place + 1))
    return directory


def test_files_are_asked_for_in_the_order_given_two_at_once(letters: Path, tmp_path: Path) -> None:
    source, progress = behind_a_gate(letters, tmp_path / "cache"), Recorded()
    arrivals = Arrivals(source, ["c", "a", "d", "c"], progress)
    with arrivals.coming():
        progress.until(lambda: len(progress.arrived) == 2)
        assert sorted(source.asked) == ["a", "c"]
        source.let_come("c", "a", "d")
        for name in "cad":
            arrivals.wait(name)
            assert (tmp_path / "cache" / name).read_bytes() == (letters / name).read_bytes()
        arrivals.wait("b")  # nobody fetches it: there is nothing to wait for
    assert (sorted(source.asked[:2]), source.asked[2:]) == (["a", "c"], ["d"])
    assert progress.arrived[1] == (100, 800)  # the first quarter of both
    pieces = [after - before for (before, _), (after, _) in pairwise([(0, 800), *progress.arrived])]
    assert sorted(pieces) == [25] * 4 + [75] * 4 + [100] * 4
    assert {of for _, of in progress.arrived} == {800}


def test_a_file_in_the_cache_is_not_asked_for(letters: Path, tmp_path: Path) -> None:
    source, progress = behind_a_gate(letters, tmp_path / "cache", here="a"), Recorded()
    arrivals = Arrivals(source, "ab", progress)
    with arrivals.coming():
        arrivals.wait("a")  # at once, though nothing has come
        source.let_come("b")
        arrivals.wait("b")
    assert source.asked == ["b"]
    assert progress.arrived == [(150, 300), (200, 300), (250, 300), (300, 300)]


def test_whoever_waits_gets_the_error_of_a_download(letters: Path, tmp_path: Path) -> None:
    source, progress = behind_a_gate(letters, tmp_path / "cache"), Recorded()
    error = SourceError("the download of `b` failed: it rains", hint="umbrella")
    source.failing["b"] = error
    arrivals = Arrivals(source, "abcd", progress)
    caught: dict[str, Exception] = {}

    def wait(name: str) -> None:
        try:
            arrivals.wait(name)
        except SourceError as raised:
            caught[name] = raised

    with arrivals.coming():
        threads = [threading.Thread(target=wait, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        source.let_come("a")
        progress.until(lambda: "c" in source.asked)
        source.let_come("b")
        for thread in threads:
            thread.join(GUARD_SECONDS)
            assert not thread.is_alive()
    source.let_come("c")
    assert caught == {"b": error, "c": error, "d": error}  # what has come can be worked on
    assert (sorted(source.asked[:2]), source.asked[2:]) == (["a", "b"], ["c"])


def test_files_that_nobody_waits_for_any_longer_are_abandoned(letters: Path, tmp_path: Path) -> None:
    source, progress = behind_a_gate(letters, tmp_path / "cache"), Recorded()
    with Arrivals(source, "abcd", progress).coming():
        progress.until(lambda: len(progress.arrived) == 2)
    downloads = [thread for thread in threading.enumerate() if thread.name == "ftload-fetch"]
    assert len(downloads) == 2
    source.let_come(*"abcd")
    for download in downloads:
        download.join(GUARD_SECONDS)
    assert sorted(source.asked) == ["a", "b"]
    assert progress.arrived in ([(25, 1000), (75, 1000)], [(50, 1000), (75, 1000)])
    assert list((tmp_path / "cache").iterdir()) == []


# -- what the plan needs first


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of four files, in each the tensors of a part of it; the first part is in the last file."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "sharded"
    write_model(directory, "llama", vocab_size=ROWS, dtype="bfloat16")
    write_llama(directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts = {"model.layers.0.": 3, "model.layers.1.": 1, "model.embed_tokens.": 4, "model.norm.": 2, "lm_head.": 2}
    of = {name: next(part for prefix, part in parts.items() if name.startswith(prefix)) for name in weights}
    names = {part: f"model-{part:05}-of-00004.safetensors" for part in (1, 2, 3, 4)}
    for part, file in names.items():
        save_file({name: weights[name] for name in weights if of[name] == part}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: names[part] for name, part in of.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


IN_ORDER = [f"model-0000{part}-of-00004.safetensors" for part in (4, 3, 1, 2)]


def test_the_files_are_needed_in_the_order_of_the_model(sharded: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(sharded, tmp_path, "--use_qlora")
    assert list(plan.files_in_order) == IN_ORDER
    assert [part.file for part in plan.stored_parts["model.embed_tokens.weight"]] == [IN_ORDER[0]]
    assert [part.file for part in plan.stored_parts["model.layers.1.mlp.up_proj.weight"]] == [IN_ORDER[2]]


def test_what_comes_first_is_done_first(sharded: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(sharded, tmp_path, "--use_qlora", "--lora_rank", "8")
    place = {name: IN_ORDER.index(parts[0].file) for name, parts in plan.stored_parts.items()}
    order = in_order(plan.model_files, None, 3, lambda step: max(place.get(of.name, 0) for of in step.outputs))
    done = [(place[step.outputs[0].name], -step.nbytes) for _, (step,) in order]
    assert done == sorted(done)
    assert {of for of, _ in done} == {0, 1, 2, 3}
    by_size = [-step.nbytes for _, (step,) in in_order(plan.model_files, None, 3)]
    assert by_size == sorted(by_size)


class Writing:
    """`write_tensors` in a thread, of a plan whose files come when they are let come."""

    def __init__(self, model: Path, work: Path, *flags: str) -> None:
        self.plan, _ = make_plan(model, work, "--lora_rank", "8", *flags)
        self.source, self.progress = behind_a_gate(model, work / "cache"), Recorded()
        self.arrivals = Arrivals(self.source, self.plan.files_in_order, self.progress)
        self.error: BaseException | None = None
        self.hashes: dict[str, str] = {}
        self._directory = work / "written"
        self._directory.mkdir()
        self._thread = threading.Thread(target=self._write)

    def begin(self) -> None:
        self._thread.start()

    def until(self, happened: Callable[[], bool]) -> None:
        self.progress.until(lambda: happened() or self.error is not None)
        assert self.error is None

    def end(self) -> None:
        self._thread.join(GUARD_SECONDS)
        assert not self._thread.is_alive()

    def _write(self) -> None:
        checkpoint = replace(self.plan.checkpoint, source=replace(self.source, wait=self.arrivals.wait))
        plan, encode = replace(self.plan, checkpoint=checkpoint), None
        if plan.encodes and plan.strategy.quantisation is not None:
            encode, _ = plan.strategy.quantisation.choose_encoder("cpu")
        try:
            with self.arrivals.coming():
                self.hashes = write_tensors(
                    plan,
                    plan.files,
                    encode,
                    self._directory,
                    Stopwatch(self.progress),
                    lambda file, digest: None,
                    self.arrivals.abandon,
                ).hashes
        except BaseException as error:  # the test looks at it
            self.error = error
            with self.progress.changed:
                self.progress.changed.notify_all()


def test_the_first_file_is_worked_on_before_the_last_has_come(sharded: Path, tmp_path: Path) -> None:
    """Events are counted: all tensors of the files that have come are written while the rest is held back."""
    writing = Writing(sharded, tmp_path, "--use_qlora")
    counts = dict.fromkeys(IN_ORDER, 0)
    for step in (step for file in writing.plan.model_files for step in file.steps):
        counts[writing.plan.stored_parts[step.outputs[0].name][0].file] += len(step.outputs)
    # the adapter needs nothing that has to come
    done = sum(len(step.outputs) for step in writing.plan.adapter_file.steps) if writing.plan.adapter_file else 0
    writing.begin()
    for name in IN_ORDER[:-1]:
        writing.source.let_come(name)
        done += counts[name]
        if name == IN_ORDER[-2]:
            writing.until(lambda done=done: writing.progress.tensors == done)
        else:
            writing.until(lambda done=done: writing.progress.tensors >= counts[IN_ORDER[0]])
    assert not writing.hashes
    assert not (tmp_path / "cache" / IN_ORDER[-1]).exists()
    writing.source.let_come(IN_ORDER[-1])
    writing.end()
    assert writing.error is None
    assert writing.progress.tensors == done + counts[IN_ORDER[-1]]
    assert writing.hashes.keys() == {file.path for file in writing.plan.files}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_qlora"], f"`{IN_ORDER[0]}` ends after 1000 bytes, before byte 18560"),
        ([], f"`{{cache}}/{IN_ORDER[0]}` became shorter while it was copied"),
    ],
)
def test_an_error_does_not_wait_for_files_that_are_on_their_way(
    sharded: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    writing = Writing(sharded, tmp_path, *flags)
    with (sharded / IN_ORDER[0]).open("r+b") as file:  # what comes is shorter than its header says
        file.truncate(1000)
    writing.begin()
    writing.source.let_come(IN_ORDER[0])
    writing.end()
    assert isinstance(writing.error, CheckpointError)
    assert writing.error.message == message.format(cache=tmp_path / "cache")
    assert set(IN_ORDER[:2]) <= set(writing.source.asked) <= set(IN_ORDER[:3])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == IN_ORDER[:1]


@pytest.mark.parametrize("flags", [["--use_qlora"], []])
def test_a_file_that_does_not_come_ends_the_run_with_its_error(sharded: Path, tmp_path: Path, flags: list[str]) -> None:
    writing = Writing(sharded, tmp_path, *flags)
    error = SourceError(f"the download of `{IN_ORDER[1]}` failed: it rains", hint="umbrella")
    writing.source.failing[IN_ORDER[1]] = error
    writing.begin()
    writing.source.let_come(*IN_ORDER[:2])
    writing.end()
    assert writing.error is error
    assert set(IN_ORDER[:2]) <= set(writing.source.asked) <= set(IN_ORDER[:3])
