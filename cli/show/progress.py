"""The progress bar: the stage, bytes and tensors so far, the rate, and the time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


class ProgressBar:
    """A `Progress` (see `loaders/progress.py`) that moves a bar of rich's."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, tensors="")
        self._tensors = self._all_tensors = 0

    def stage(self, name: str) -> None:
        """Show another stage."""
        self._bar.update(self._task, description=name)

    def expect(self, *, bytes: int, tensors: int) -> None:
        """Start again at zero, with a new end."""
        self._tensors, self._all_tensors = 0, tensors
        self._bar.reset(self._task, total=bytes, tensors="")

    def advance(self, *, bytes: int, tensors: int) -> None:
        """Move on."""
        self._tensors += tensors
        count = f"{self._tensors}/{self._all_tensors} tensors" if self._all_tensors else ""
        self._bar.update(self._task, advance=bytes, tensors=count)


def make_bar(console: Console) -> Bar:
    """A bar with one line for `ProgressBar`; it is wiped away at the end."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TextColumn("{task.fields[tensors]}"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
