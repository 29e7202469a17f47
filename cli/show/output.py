"""The one place that prints: results to stdout, talk to stderr; for people or, with `--json`, for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import Failure, explain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from ...loaders.doctor.diagnosis import Diagnosis
    from ...loaders.errors import FtloadError
    from ...loaders.inspect.comparison import Comparison
    from ...loaders.inspect.inspection import Inspection
    from ...loaders.inspect.inventory import StoredTensor
    from ...loaders.prepare import Outcome
    from ...loaders.progress import Progress
    from ...loaders.verify.verify import Verification


class Output:
    """Prints results, progress and errors in the way that was asked for."""

    def __init__(self) -> None:
        self.configure(as_json=False, quiet=False, debug=False)

    def configure(self, *, as_json: bool, quiet: bool, debug: bool) -> None:
        """Decide, once the flags are known, how everything is printed."""
        self._as_json = as_json
        self._quiet = quiet
        self._debug = debug

    def outcome(self, outcome: Outcome, directory: str) -> None:
        """The result of `prepare`: with `--json` the report itself, else tables."""
        if self._as_json:
            print(json.dumps(outcome.report, indent=2))
        elif not self._quiet:
            from .summary import print_summary

            print_summary(outcome, directory)

    def plan(self, plan: Mapping[str, Any], directory: str) -> None:
        """The result of `plan`: with `--json` the plan itself, else tables."""
        if self._as_json:
            print(json.dumps(plan, indent=2))
        elif not self._quiet:
            from .summary import print_plan

            print_plan(plan, directory)

    def verification(self, verification: Verification) -> int:
        """The result of `verify`; returns the exit code."""
        error = verification.error
        if self._as_json:
            checks = [{**asdict(check), "ok": check.ok} for check in verification.checks]
            print(
                json.dumps(
                    {"directory": verification.directory, "ok": verification.ok, "checks": checks, **_verdict(error)}
                )
            )
        elif not self._quiet:
            from .summary import print_checks

            print_checks(verification)
        return self._end(error)

    def inspection(self, inspection: Inspection, tensors: tuple[StoredTensor, ...] | None) -> None:
        """The result of `inspect`, with a list of some tensors or without."""
        if self._as_json:
            print(json.dumps(inspection.to_json(tensors)))
        else:
            from .inspection_tables import print_inspection

            print_inspection(inspection, tensors)

    def comparison(self, comparison: Comparison) -> None:
        """The result of `inspect` with two checkpoints."""
        if self._as_json:
            print(json.dumps(comparison.to_json()))
        else:
            from .inspection_tables import print_comparison

            print_comparison(comparison)

    def diagnosis(self, diagnosis: Diagnosis) -> int:
        """The result of `doctor`; returns the exit code."""
        error = diagnosis.error
        if self._as_json:
            print(json.dumps({**diagnosis.to_json(), **_verdict(error)}))
        else:
            from .diagnosis_tables import print_diagnosis

            print_diagnosis(diagnosis)
        return self._end(error)

    def _end(self, error: FtloadError | None) -> int:
        """Tell what was found wrong, if anything was; returns the exit code."""
        if error is None:
            return 0
        self._tell(explain(error))
        return error.code

    def failure(self, failure: Failure) -> None:
        """One line and a hint on stderr (with `--debug` a traceback first); with `--json` a document on stdout too."""
        if self._debug:
            import traceback

            traceback.print_exc()
        if self._as_json:
            print(json.dumps({"error": _json_error(failure)}))
        self._tell(failure)

    def _tell(self, failure: Failure) -> None:
        try:
            from rich.console import Console
            from rich.markup import escape
        except (ImportError, MemoryError, OSError):  # memory may be what there is too little of
            hint = f"hint: {failure.hint}\n" if failure.hint else ""
            sys.stderr.write(f"error: {failure.message}\n{hint}")
            return
        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        console.print(f"[bold red]error:[/] {escape(failure.message)}")
        if failure.hint:
            console.print(f"[bold cyan]hint:[/] {escape(failure.hint)}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress on stderr while the work goes on: nothing unless stderr is a terminal."""
        if self._quiet or not sys.stderr.isatty():
            from ...loaders.progress import Silent

            yield Silent()
            return
        from rich.console import Console

        with _bar(Console(stderr=True)) as bar:
            yield _Shown(bar)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A word on stderr while something without a measure goes on: nothing unless stderr is a terminal."""
        if self._quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield


def _verdict(error: FtloadError | None) -> dict[str, Any]:
    return {} if error is None else {"error": _json_error(explain(error))}


def _json_error(failure: Failure) -> dict[str, Any]:
    return {"code": failure.code, "kind": failure.kind, "message": failure.message, "hint": failure.hint}


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks (torchrun's `RANK`)."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


OUTPUT = Output()
"""What every command prints through."""


class _Shown:
    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, tensors="")
        self._tensors = self._all_tensors = 0

    def stage(self, name: str) -> None:
        self._bar.update(self._task, description=name)

    def expect(self, *, bytes: int, tensors: int) -> None:
        self._tensors, self._all_tensors = 0, tensors
        self._bar.reset(self._task, total=bytes, tensors="")

    def advance(self, *, bytes: int, tensors: int) -> None:
        self._tensors += tensors
        count = f"{self._tensors}/{self._all_tensors} tensors" if self._all_tensors else ""
        self._bar.update(self._task, advance=bytes, tensors=count)


def _bar(console: Console) -> Bar:
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
