"""The one place that prints: results to stdout, all else to stderr; for people or, with `--json`, for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from ..errors import Failure, Interrupted, explain

if TYPE_CHECKING:
    from ...loaders.doctor.diagnosis import Diagnosis
    from ...loaders.errors import FtloadError
    from ...loaders.fuse import FusedAdapter
    from ...loaders.inspect.comparison import Comparison
    from ...loaders.inspect.inspection import Inspection
    from ...loaders.inspect.inventory import StoredTensor
    from ...loaders.prepare import Outcome, PlanOutcome
    from ...loaders.progress import Progress
    from ...loaders.recipe.recipe import Recipe
    from ...loaders.report.rebased import Rebased
    from ...loaders.verify.verify import Verification


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How a command prints, as its flags ask. In `with`, it reports the error that ends the command."""

    as_json: bool = False
    quiet: bool = False
    """No results as tables, and no progress."""
    debug: bool = False

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Output:
        """Make it from the values of `json`, `quiet` and `debug`.

        A value of None is one that could not be read: it counts as the wish for what the flag does. Of the processes
        that `torchrun` starts, only the first prints results.
        """
        first = _is_first_process()
        as_json, quiet, debug = (flags.get(name, False) is not False for name in ("json", "quiet", "debug"))
        return cls(as_json=as_json and first, quiet=quiet or not first, debug=debug)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                sys.stdout.flush()
            except OSError as failed:
                error = failed
        if isinstance(error, (Exception, SystemExit, Interrupted)):
            raise typer.Exit(self.end(error)) from error

    def outcome(self, outcome: Outcome, directory: str) -> None:
        """The result of `prepare`: with `--json` the report itself, else tables."""
        if self.as_json:
            from ...loaders.report.json_values import to_json

            print(json.dumps(to_json(outcome.report), indent=2))
        elif not self.quiet:
            from .summary import print_summary

            print_summary(outcome, directory)

    def plan(self, outcome: PlanOutcome, directory: str) -> int:
        """The result of `plan`: with `--json` its document, else tables; returns the exit code."""
        error = outcome.error
        if self.as_json:
            print(json.dumps({**outcome.to_json(), **_error_key(error)}, indent=2))
        elif not self.quiet:
            from .summary import print_plan

            print_plan(outcome, directory)
        return _verdict(error)

    def fused(self, fused: FusedAdapter) -> None:
        """The result of `merge --adapter_only`."""
        if self.as_json:
            print(json.dumps(asdict(fused)))
        elif not self.quiet:
            from .summary import print_fused

            print_fused(fused)

    def recipe(self, recipe: Recipe, *, written: bool) -> None:
        """The result of `recipe`: the file itself, or where it was written and how it is run."""
        if self.as_json:
            print(json.dumps(asdict(recipe)))
        elif written:
            from .summary import print_recipe

            print_recipe(recipe)
        else:
            print(recipe.text, end="")

    def verification(self, verification: Verification, rebased: Rebased | None) -> int:
        """The result of `verify`, and what `--fix` did before it; returns the exit code."""
        error = verification.error
        if self.as_json:
            document = {
                "directory": verification.directory,
                "ok": verification.ok,
                "fixed": None if rebased is None else asdict(rebased),
                "checks": [{**asdict(check), "ok": check.ok} for check in verification.checks],
            }
            print(json.dumps({**document, **_error_key(error)}))
        elif not self.quiet:
            from .summary import print_checks

            print_checks(verification, rebased)
        return _verdict(error)

    def inspection(self, inspection: Inspection, tensors: tuple[StoredTensor, ...] | None) -> None:
        """The result of `inspect`, with a list of some tensors or without."""
        if self.as_json:
            print(json.dumps(inspection.to_json(tensors)))
        elif not self.quiet:
            from .inspection_tables import print_inspection

            print_inspection(inspection, tensors)

    def comparison(self, comparison: Comparison) -> None:
        """The result of `inspect` with two checkpoints."""
        if self.as_json:
            print(json.dumps(comparison.to_json()))
        elif not self.quiet:
            from .inspection_tables import print_comparison

            print_comparison(comparison)

    def diagnosis(self, diagnosis: Diagnosis) -> int:
        """The result of `doctor`; returns the exit code."""
        error = diagnosis.error
        if self.as_json:
            print(json.dumps({**diagnosis.to_json(), **_error_key(error)}))
        elif not self.quiet:
            from .diagnosis_tables import print_diagnosis

            print_diagnosis(diagnosis)
        return _verdict(error)

    def end(self, error: BaseException, command: str = "") -> int:
        """Report the error that ended `command`; returns the exit code.

        One line and a hint go to stderr, a traceback before them with `--debug`; with `--json` a document to stdout.
        """
        # click and rich turn it into an exit when whoever reads stdout has gone
        if BrokenPipeError in (type(error), type(error.__context__)):
            # Python would complain again when it closes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        failure = explain(error, command)
        if self.debug:
            import traceback

            traceback.print_exception(error)
        if self.as_json:
            print(json.dumps({"error": asdict(failure)}))
        _tell(failure)
        return failure.code

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show progress on stderr while the work goes on: nothing unless stderr is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            from ...loaders.progress import Silent

            yield Silent()
            return
        from rich.console import Console

        from .progress import ProgressBar, imports_shown, make_bar

        with make_bar(Console(stderr=True)) as bar:
            progress = ProgressBar(bar)
            with imports_shown(progress):
                yield progress

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a word on stderr while something without a measure goes on: nothing unless stderr is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield


def _verdict(error: FtloadError | None) -> int:
    """Report what was found wrong, if anything was; returns the exit code."""
    if error is None:
        return 0
    _tell(explain(error))
    return error.code


def _tell(failure: Failure) -> None:
    """Print a failure on stderr: if nobody reads it, the exit code still counts."""
    with suppress(OSError, SystemExit):  # rich turns a broken pipe into an exit
        try:
            from rich.console import Console
            from rich.markup import escape

            from .tables import print_line
        except (ImportError, MemoryError, OSError):  # memory may be what there is too little of
            hint = f"hint: {failure.hint}\n" if failure.hint else ""
            sys.stderr.write(f"error: {failure.message}\n{hint}")
            return
        console = Console(stderr=True, highlight=False, emoji=False)
        print_line(console, f"[bold red]error:[/] {escape(failure.message)}")
        if failure.hint:
            print_line(console, f"[bold cyan]hint:[/] {escape(failure.hint)}")


def _error_key(error: FtloadError | None) -> dict[str, Any]:
    """The key `error` of a document, if there is one."""
    return {} if error is None else {"error": asdict(explain(error))}


def _is_first_process() -> bool:
    """Whether this is the first of several processes, or the only one (`RANK`, which `torchrun` sets)."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
