"""Every error that a user can cause or meet, with its exit code.

Messages name the file, tensor or flag at fault in backticks and end without a full stop; `hint` says what to do.
"""

from __future__ import annotations


class FtloadError(Exception):
    """An error with a message for people; anything else that escapes ftload is a bug in it (exit code 1)."""

    code: int = 1
    """The process exit code: a contract, see the README."""
    kind: str = "bug"
    """The word for the class of error in `--json` output."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def said_by(error: BaseException | str) -> str:
    """What another library's exception says, in one line and without a full stop, to be part of a message."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    if first.endswith(":") and rest:
        first = f"{first} {rest[0].strip()}"
    return first.rstrip(".")


class UsageError(FtloadError):
    """A flag, a YAML key or a value that can't be used."""

    code = 2
    kind = "usage"


class SourceError(FtloadError):
    """The model or tokenizer is not there, can't be reached, or needs permission."""

    code = 3
    kind = "source"


class CheckpointError(FtloadError):
    """What was found is not a checkpoint that can be prepared, or is not safe to read."""

    code = 4
    kind = "checkpoint"


class MissingRequirementError(FtloadError):
    """This machine or Python environment lacks something that was asked for."""

    code = 5
    kind = "environment"


class ResourceError(FtloadError):
    """Not enough disk or memory, or the disk fails."""

    code = 6
    kind = "resource"


class VerificationError(FtloadError):
    """What was written is not what was planned."""

    code = 7
    kind = "verification"


class OutputError(FtloadError):
    """The output directory exists, is in use, or can't be written."""

    code = 8
    kind = "output"
