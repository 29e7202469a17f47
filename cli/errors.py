"""Exceptions become an exit code and words; the first entry that fits counts."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from ..loaders.errors import FtloadError, ResourceError, UsageError


class Interrupted(BaseException):
    """The process was asked to stop; `code` is 128 and the signal's number.

    No `Exception`, like Python's own `KeyboardInterrupt`: wherever a library is tried, any of those is an answer.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What to tell about an exception, and the exit code."""

    code: int
    kind: str
    message: str
    hint: str | None


def explain(error: BaseException) -> Failure:
    """Turn any exception into a `Failure`. What is not expected is a bug in ftload, exit code 1."""
    if isinstance(error, Interrupted):
        return Failure(code=error.code, kind="interrupted", message="interrupted", hint=None)
    if isinstance(error, FtloadError):
        return Failure(
            code=error.code,
            kind=error.kind,
            message=one_line(error.message),
            hint=one_line(error.hint) or None,
        )
    if isinstance(error, MemoryError):
        return Failure(code=ResourceError.code, kind=ResourceError.kind, message="out of memory", hint=None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        # files are named where they are written: what is left is stdout
        message = f"can't write to stdout: {error.strerror}"
        return Failure(code=ResourceError.code, kind=ResourceError.kind, message=message, hint=None)
    # typer brings its own copy of click, in some versions under a private name: its errors are known by their shape
    describe = getattr(error, "format_message", None)
    if callable(describe):
        return Failure(
            code=UsageError.code,
            kind=UsageError.kind,
            message=one_line(str(describe()).rstrip(".")),
            hint="see `ftload --help`",
        )
    return Failure(
        code=FtloadError.code,
        kind=FtloadError.kind,
        message=one_line(f"a bug in ftload: {type(error).__name__}: {error}"),
        hint="run it again with --debug and report what it prints",
    )


def one_line(text: str | None) -> str:
    """Text that is safe to print."""
    # names in a checkpoint can hold control characters, which must not reach a terminal
    return "".join(c if c.isprintable() else " " for c in text or "").strip()
