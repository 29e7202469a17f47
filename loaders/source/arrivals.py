"""Files on their way from a hub: several at once if that is faster, in the order in which they are needed.

Whoever needs one waits for it, so that work begins with the first file and not after the last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..progress import Progress
from .source import Source

_FEWEST_AT_ONCE = 2
"""While a piece of one file is written to the disk, the line carries the other."""
_MOST_AT_ONCE = 8
_SETTLED_SECONDS = 1.0
"""A connection is not at its full speed at first."""
_MEASURED_SECONDS = 1.0
_WORTH_IT = 0.5
"""Of what each file brought before, from one file more: less can be chance, and files that arrive together are worked
on late."""


class Pace:
    """How many files travel at once: one more, as long as that makes all of them together faster."""

    def __init__(self) -> None:
        self.at_once = _FEWEST_AT_ONCE
        self._is_found = False
        self._rate = 0.0
        self._begin: float | None = None
        self._measured: tuple[float, int] | None = None

    def at(self, seconds: float, arrived: int) -> int:
        """How many at `seconds`, when so many bytes have `arrived`."""
        if self._begin is None:
            self._begin = seconds
        if self._is_found or seconds - self._begin < _SETTLED_SECONDS:
            return self.at_once
        if self._measured is None:
            self._measured = seconds, arrived
        since, before = self._measured
        if seconds - since < _MEASURED_SECONDS:
            return self.at_once
        rate = (arrived - before) / (seconds - since)
        if self._rate and rate - self._rate < self._rate / (self.at_once - 1) * _WORTH_IT:
            self.at_once -= 1
            self._is_found = True
        elif self.at_once == _MOST_AT_ONCE:
            self._is_found = True
        else:
            self.at_once, self._rate = self.at_once + 1, rate
            self._begin, self._measured = seconds, None
        return self.at_once


class Arrivals:
    """Downloads files of a repository into the cache, in threads, while a block runs."""

    def __init__(self, source: Source, names: Iterable[str], progress: Progress) -> None:
        self._source = source
        self._names = tuple(dict.fromkeys(names))
        self._progress = progress
        sizes = {file.path: file.bytes for file in source.files}
        self._size = sum(sizes[name] for name in self._names)
        self._here = {name for name in self._names if source.is_here([name])}
        self._left = [name for name in self._names if name not in self._here]
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._stopped = False
        self._arrived = sum(sizes[name] for name in self._here)
        self._running = 0
        self._pace = Pace()
        self.seconds = 0.0
        """From the first byte that was asked for to the last that came."""

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Let them come. At the end of the block those that are still on their way are abandoned."""
        self._begin = time.monotonic()
        self._go_on()
        try:
            yield
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nothing more is needed: whoever waits is sent away."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self, name: str) -> None:
        """Until the file is in the cache; at once for one that is not among these. Raises what its download raised."""
        if name not in self._names:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._stopped or name in self._here)
            if name not in self._here:
                raise self._error or _Abandoned

    def _go_on(self) -> None:
        """Begin as many downloads as may run."""
        with self._changed:
            count = min(self._pace.at(time.monotonic(), self._arrived) - self._running, len(self._left))
            for _ in range(count if self._error is None else 0):
                self._running += 1
                name = self._left.pop(0)
                threading.Thread(target=self._get, args=(name,), name="ftload-fetch", daemon=True).start()

    def _get(self, name: str) -> None:
        error = None
        try:
            self._source.fetch([name], self._count)
        except _Abandoned:
            return
        except Exception as caught:  # whoever waits raises it
            error = caught
        with self._changed:
            self._running -= 1
            self._error = self._error or error
            if error is None:
                self._here.add(name)
            self.seconds = time.monotonic() - self._begin
            self._changed.notify_all()
        self._go_on()

    def _count(self, number: int) -> None:
        with self._changed:
            if self._stopped or self._error:
                raise _Abandoned
            self._arrived += number
            self._progress.arriving(bytes=self._arrived, of=self._size)
        self._go_on()


class _Abandoned(Exception):
    """Nobody needs this file any longer."""
