"""One run: the place that it works in, the processes that share the work, and its stopwatch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..progress import Stopwatch
from ..system.durable import disk_errors
from .processes import Processes
from .staging import Staging


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the stages after the request share."""

    fingerprint: str
    """Of what is to be written: see `fingerprint.py`."""
    staging: Staging
    processes: Processes
    watch: Stopwatch

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once: resume, report, publish."""
        return self.processes.rank == 0

    @property
    def scratch(self) -> Path:
        """A directory for what this process needs on the way; it does not outlive the run."""
        return self.staging.scratch(self.processes.rank)

    def make_scratch(self) -> None:
        """Make that directory."""
        with disk_errors(self.scratch):
            self.scratch.mkdir()
