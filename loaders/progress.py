"""How far the work has come, and where the time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol


class Timings:
    """Seconds spent in each stage, and word of it to whoever watches."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that comes again adds up."""
        self.progress.stage(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class Progress(Protocol):
    """Hears how far the work has come."""

    def stage(self, name: str) -> None:
        """A new stage begins."""
        ...

    def expect(self, *, bytes: int, tensors: int) -> None:
        """This much will be written."""
        ...

    def advance(self, *, bytes: int, tensors: int) -> None:
        """This much more has been written. Called from several threads, one at a time."""
        ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str) -> None:
        """Say nothing."""

    def expect(self, *, bytes: int, tensors: int) -> None:
        """Say nothing."""

    def advance(self, *, bytes: int, tensors: int) -> None:
        """Say nothing."""
