"""Proving that a prepared directory is what its report says, and that it trains.

Each check stands on its own and all of them are made, so that one run tells everything that is wrong. First what the
files say, then what the libraries make of them: `load_prepared` and one training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FtloadError, VerificationError, said_by
from ..report.outputs import prepared_root, read_document
from .adapter import check_adapter
from .files import PREPARE_AGAIN, Context, check_config, check_files, check_report, check_tensors
from .tokenizer import check_chat_template, check_tokenizer
from .training import check_training

if TYPE_CHECKING:
    from ..progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    problems: tuple[str, ...]
    """What is wrong; empty where nothing is."""
    found: str
    """What was seen, in a few words."""
    notes: tuple[str, ...]
    """What should be known, and is nothing wrong."""
    hint: str | None
    """What helps against the first problem, where there is one and something is known to."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """All checks of a directory, in the order in which they were made."""

    directory: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is."""
        return all(check.ok for check in self.checks)

    @property
    def error(self) -> VerificationError | None:
        """What failed, in one line; None if nothing did."""
        failed = [check for check in self.checks if not check.ok]
        if not failed:
            return None
        listed = "; ".join(f"{check.name}: {check.problems[0]}{_more(check.problems)}" for check in failed)
        hints = [check.hint for check in failed if check.hint is not None]
        return VerificationError(
            f"`{self.directory}`: {len(failed)} of {len(self.checks)} checks failed: {listed}",
            hint=PREPARE_AGAIN if PREPARE_AGAIN in hints else next(iter(hints), None),
        )


def verify(directory: Path, *, quick: bool, trust_remote_code: bool, progress: Progress) -> Verification:
    """Check a prepared directory; `quick` leaves out loading the model and the training step.

    Every file is read once for its hash; beyond that the quick way reads headers, the JSON files, the tokenizer, of a
    4-bit weight its statistics (a thirty-second of it), of each lora A 16 KiB, and what an adapter trains of the base
    itself, beside the base's. Of a base on a hub: headers alone.

    Raises `CheckpointError` when there is no report that this version understands, `SourceError` when there is no such
    directory.
    """
    root = prepared_root(directory)
    steps: list[tuple[str, Callable[[Context], Iterator[str]]]] = [
        ("report", check_report),
        ("files", check_files),
        ("tensors", check_tensors),
        ("config", check_config),
        ("tokenizer", check_tokenizer),
        ("chat template", check_chat_template),
        ("adapter", check_adapter),
    ]
    if not quick:
        steps.append(("training step", check_training))
    context = Context(root=root, document=read_document(root), trust_remote_code=trust_remote_code, progress=progress)
    checks = []
    for name, check in steps:
        progress.stage(name)
        context.found, context.notes, context.hint = "", (), PREPARE_AGAIN
        problems: list[tuple[str, str | None]] = []
        try:
            problems += ((problem, context.hint) for problem in check(context))
        except FtloadError as error:
            problems.append((error.message, error.hint or context.hint))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            # the files may hold anything: what can't be understood does not verify
            problems.append((f"can't be understood: {type(error).__name__}: {said_by(error)}", context.hint))
        except FileNotFoundError as error:
            problems.append((said_by(error), context.hint))
        except (OSError, RuntimeError, ImportError) as error:
            problems.append((said_by(error), None))
        checks.append(
            Check(
                name=name,
                problems=tuple(problem for problem, _ in problems),
                found=context.found,
                notes=context.notes,
                hint=problems[0][1] if problems else None,
            )
        )
    return Verification(directory=str(directory), checks=tuple(checks))


def _more(problems: tuple[str, ...]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
