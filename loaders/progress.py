"""How far the work has come, and where the time goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """Receives how far the work has come."""

    def stage(self, name: str) -> None:
        """A new stage begins. Nothing is known of its length before `expect`."""
        ...

    def expect(self, *, bytes: int, tensors: int) -> None:
        """This much will be written, fetched or hashed in this stage."""
        ...

    def advance(self, *, bytes: int, tensors: int) -> None:
        """This much more has been. Called from several threads, one at a time."""
        ...

    def arriving(self, *, bytes: int, of: int) -> None:
        """So many bytes of a source have arrived, of so many, beside what is written. Called as `advance` is."""
        ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str) -> None:
        """Say nothing."""

    def expect(self, *, bytes: int, tensors: int) -> None:
        """Say nothing."""

    def advance(self, *, bytes: int, tensors: int) -> None:
        """Say nothing."""

    def arriving(self, *, bytes: int, of: int) -> None:
        """Say nothing."""


class Stopwatch:
    """Seconds of each stage, which follow one another, and of each kind of work, which threads do side by side."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.stages: dict[str, float] = {}
        self.work: dict[str, float] = {}
        """Added up over all threads."""
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and announce it; one that comes again adds up."""
        self.progress.stage(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin

    @contextlib.contextmanager
    def working(self, kind: str) -> Iterator[None]:
        """Time what this thread does; work of another kind within it counts there alone."""
        outer: float = getattr(self._local, "inner", 0.0)
        self._local.inner = 0.0
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            with self._lock:
                self.work[kind] = self.work.get(kind, 0.0) + seconds - self._local.inner
            self._local.inner = outer + seconds
