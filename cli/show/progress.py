"""The progress bar: the stage, bytes and tensors so far, the rate, and the time left; and what is being imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


class ProgressBar:
    """A `Progress` (see `loaders/progress.py`) on a bar of rich's; where no end is known, it names the stage alone."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._stage = "starting"
        self._task = bar.add_task(self._stage, total=None, tensors="")
        self._tensors = self._all_tensors = 0
        self._arrived = ""
        self._library: str | None = None

    def stage(self, name: str) -> None:
        """Show another stage."""
        self._stage, self._arrived = name, ""
        self._begin(None, 0)

    def expect(self, *, bytes: int, tensors: int) -> None:
        """Start again at zero, with a new end."""
        self._begin(bytes or None, tensors)

    def advance(self, *, bytes: int, tensors: int) -> None:
        """Move on."""
        self._tensors += tensors
        self._bar.update(self._task, advance=bytes, tensors=self._beside)

    def arriving(self, *, bytes: int, of: int) -> None:
        """Show how much of the source has arrived, beside what is written."""
        from rich.filesize import decimal

        self._arrived = f"fetched {decimal(bytes)} of {decimal(of)}" if bytes < of else ""
        self._bar.update(self._task, tensors=self._beside)

    @property
    def _beside(self) -> str:
        tensors = f"{self._tensors}/{self._all_tensors} tensors" if self._all_tensors else ""
        return " · ".join(filter(None, (tensors, self._arrived)))

    @contextlib.contextmanager
    def importing(self, library: str) -> Iterator[None]:
        """Show that a library is being imported, one within another; afterwards what was shown before."""
        outer, self._library = self._library, library
        self._describe(outer)
        try:
            yield
        finally:
            self._library = outer
            self._describe(library)

    def _begin(self, total: int | None, tensors: int) -> None:
        self._tensors, self._all_tensors = 0, tensors
        self._bar.refresh()  # the stage that ends is seen to end
        self._bar.remove_task(self._task)  # rich can't take an end away again
        self._task = self._bar.add_task(self._words, total=total, tensors="")

    def _describe(self, before: str | None) -> None:
        if before != self._library:  # a library has hundreds of parts
            self._bar.update(self._task, description=self._words, refresh=True)

    @property
    def _words(self) -> str:
        return self._stage if self._library is None else f"importing {self._library}"


_SLOW = frozenset(("accelerate", "bitsandbytes", "liger_kernel", "numba", "peft", "torch", "transformers", "triton"))
"""Libraries whose import takes so long that somebody waits for it."""


@contextlib.contextmanager
def imports_shown(bar: ProgressBar) -> Iterator[None]:
    """Name each of these libraries while it, or a part of it, is imported."""
    finder = _Finder(bar)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder:
    """Finds what Python's own finder finds, and has the bar told when its code begins and ends to run."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        library = name.partition(".")[0]
        spec = PathFinder.find_spec(name, path, target) if library in _SLOW else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def run(module: Any) -> None:
            del loader.exec_module
            with self._bar.importing(library):
                execute(module)

        loader.exec_module = run
        return spec


def make_bar(console: Console) -> Bar:
    """A bar with one line for `ProgressBar`; it is wiped away at the end."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Measured(ProgressColumn):
        """A column that stays empty as long as nothing is known of the end."""

        def __init__(self, column: ProgressColumn) -> None:
            super().__init__()
            self._column = column

        def render(self, task: Task) -> Any:
            return "" if task.total is None else self._column(task)

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        Measured(BarColumn()),
        Measured(DownloadColumn(binary_units=False)),
        TextColumn("{task.fields[tensors]}"),
        Measured(TransferSpeedColumn()),
        Measured(TimeRemainingColumn()),
        console=console,
        transient=True,
    )
