"""Exceptions become an exit code and words; the first entry that fits counts."""

from __future__ import annotations

import errno
import re
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


def explain(error: BaseException, command: str = "") -> Failure:
    """Turn any exception, in which `command` ended, into a `Failure`. What is not expected is a bug, exit code 1."""
    if isinstance(error, Interrupted):
        return Failure(code=error.code, kind="interrupted", message="interrupted", hint=None)
    if not isinstance(error, ResourceError) and _is_out_of_memory(error):
        said = f": {one_line(error.message)}" if isinstance(error, FtloadError) else ""
        return Failure(
            code=ResourceError.code,
            kind=ResourceError.kind,
            message=f"out of memory{said}",
            hint="free some memory, or raise the limit that `ulimit -v` shows",
        )
    if isinstance(error, FtloadError):
        return Failure(
            code=error.code,
            kind=error.kind,
            message=one_line(error.message),
            hint=one_line(error.hint) or None,
        )
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
            hint=_where_it_is_told(error, command),
        )
    return Failure(
        code=FtloadError.code,
        kind=FtloadError.kind,
        message=one_line(f"a bug in ftload: {type(error).__name__}: {error}"),
        hint="run it again with --debug and report what it prints",
    )


_NO_MEMORY = re.compile(
    r"can('t|not) allocate memory|unable to allocate|bad_alloc|out of memory|can't start new thread"
    r"|failed to map segment from shared object(?!: Operation not permitted)",
    re.IGNORECASE,
)
"""What the system, C++, Rust, the linker and Python's threads say; libraries hand it on as whatever they like."""


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, is for want of memory."""
    while error is not None:
        text = "" if isinstance(error, FtloadError) else str(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            return True
        error = error.__cause__ or error.__context__
    return False


def _where_it_is_told(error: BaseException, command: str) -> str:
    """The help that answers a usage error of click's, raised by a command or before there is one."""
    commands = getattr(getattr(getattr(error, "ctx", None), "command", None), "commands", None)
    if commands:
        return f"a command comes first: {', '.join(commands)}; see `ftload --help`"
    return f"see `ftload {command} --help`"


def one_line(text: str | None) -> str:
    """Text that is safe to print."""
    # names in a checkpoint can hold control characters, which must not reach a terminal
    return "".join(c if c.isprintable() else " " for c in text or "").strip()
