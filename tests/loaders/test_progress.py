"""Where the time goes: stages follow one another, kinds of work are added up over threads."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ftload.loaders import progress
from ftload.loaders.progress import Silent, Stopwatch


class Clock:
    """Time that passes when it is told to, in each thread by itself."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._local = threading.local()
        patch.setattr(progress, "time", SimpleNamespace(perf_counter=self.now))

    def now(self) -> float:
        return getattr(self._local, "now", 0.0)

    def pass_seconds(self, seconds: float) -> None:
        self._local.now = self.now() + seconds


class Listening(Silent):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)


def test_a_stage_that_comes_again_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, listening = Clock(monkeypatch), Listening()
    watch = Stopwatch(listening)
    for name, seconds in (("config", 1.0), ("plan", 2.0), ("config", 4.0)):
        with watch.stage(name):
            clock.pass_seconds(seconds)
    assert watch.stages == {"config": 5.0, "plan": 2.0}
    assert listening.stages == ["config", "plan", "config"]


def test_a_stage_that_fails_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch(Silent())
    with pytest.raises(ValueError, match="no"), watch.stage("plan"), watch.working("convert"):
        clock.pass_seconds(3.0)
        raise ValueError("no")
    assert (watch.stages, watch.work) == ({"plan": 3.0}, {"convert": 3.0})


def test_work_within_other_work_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step reads, converts and writes, chunk after chunk."""
    clock = Clock(monkeypatch)
    watch = Stopwatch(Silent())
    for _ in range(2):
        with watch.working("convert"):
            with watch.working("read"):
                clock.pass_seconds(1.0)
            clock.pass_seconds(10.0)
            with watch.working("write"):
                clock.pass_seconds(100.0)
                with watch.working("hash"):
                    clock.pass_seconds(1000.0)
            clock.pass_seconds(20.0)
    assert watch.work == {"read": 2.0, "convert": 60.0, "write": 200.0, "hash": 2000.0}


def test_the_work_of_threads_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch(Silent())
    both = threading.Barrier(2)

    def work(seconds: float) -> None:
        with watch.working("convert"):
            both.wait(60)
            with watch.working("read"):
                clock.pass_seconds(seconds)
            both.wait(60)

    threads = [threading.Thread(target=work, args=(seconds,)) for seconds in (1.0, 4.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.work == {"read": 5.0, "convert": 0.0}
