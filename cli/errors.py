"""What an exception is to the user: an exit code, a message and a hint."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from ..loaders.errors import FtloadError, ResourceError, UsageError
from ..loaders.system.safe_text import one_line


class Interrupted(BaseException):
    """The process was asked to stop; `code` is 128 plus the signal's number.

    Not an `Exception`, like Python's `KeyboardInterrupt`: where a library is tried, any `Exception` is its answer.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What to report of an exception, and the exit code."""

    code: int
    kind: str
    message: str
    hint: str | None


def explain(error: BaseException, command: str = "") -> Failure:
    """Turn the exception that ended `command` into a `Failure`. One that nobody foresaw is a bug: exit code 1."""
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
        # a file that can't be written is an `FtloadError`, which names it: only stdout is left
        message = f"can't write to stdout: {error.strerror}"
        return Failure(code=ResourceError.code, kind=ResourceError.kind, message=message, hint=None)
    # typer has its own copy of click, under a private name in some versions: its errors are recognised by their shape
    describe = getattr(error, "format_message", None)
    if callable(describe):
        return Failure(
            code=UsageError.code,
            kind=UsageError.kind,
            message=one_line(str(describe()).rstrip(".")),
            hint=_hint_for(error, command),
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
"""Messages of the system, C++, Rust, the linker and Python's threads; libraries raise them as errors of any type."""


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, says that memory ran out."""
    while error is not None:
        text = "" if isinstance(error, FtloadError) else str(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            return True
        error = error.__cause__ or error.__context__
    return False


def _hint_for(error: BaseException, command: str) -> str:
    """Where to look after a usage error of click's, raised by a command or before one is found."""
    commands = getattr(getattr(getattr(error, "ctx", None), "command", None), "commands", None)
    if commands:
        return f"a command comes first: {', '.join(commands)}; see `ftload --help`"
    return f"see `ftload {command} --help`"
