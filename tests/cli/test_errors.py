"""What an exception is told as: its exit code and words."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from ftload.cli.errors import explain
from ftload.cli.show.output import Output
from ftload.loaders.errors import CheckpointError, FtloadError, MissingRequirementError, ResourceError
from ftload.loaders.system.durable import disk_errors

HINT = "free some memory, or raise the limit that `ulimit -v` shows"


def after(error: Exception, cause: Exception | None, *, said: bool = True) -> Exception:
    """`error` as `raise … from cause` leaves it or, unless that is said, raising it where `cause` is being handled."""
    error.__context__ = cause
    if said:
        error.__cause__ = cause
    return error


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize(
    "cause",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ValueError("Unable to allocate 1.2 GiB for an array"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        Exception("unable to mmap 9 bytes: Cannot allocate memory (os error 12)"),
    ],
)
def test_want_of_memory_whatever_it_was_taken_for(cause: Exception, said: bool) -> None:
    failure = explain(after(CheckpointError("`x` can't be used", hint="again"), cause, said=said))
    assert (failure.code, failure.kind) == (6, "resource")
    assert (failure.message, failure.hint) == ("out of memory: `x` can't be used", HINT)
    failure = explain(cause)
    assert (failure.code, failure.message, failure.hint) == (6, "out of memory", HINT)


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (CheckpointError("x"), RuntimeError("out of range"), 4),
        (CheckpointError("tensor `out of memory` is missing"), None, 4),
        (
            MissingRequirementError("x"),
            ImportError("a.so: failed to map segment from shared object: Operation not permitted"),
            5,
        ),
    ],
)
def test_what_is_no_want_of_memory(error: FtloadError, cause: Exception | None, code: int) -> None:
    failure = explain(after(error, cause))
    assert (failure.code, failure.message) == (code, error.message)


def test_a_limit_of_its_own_keeps_its_words() -> None:
    failure = explain(after(ResourceError("x needs 5 bytes", hint="more"), MemoryError()))
    assert (failure.code, failure.message, failure.hint) == (6, "x needs 5 bytes", "more")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_is_full_or_fails(tmp_path: Path, code: int) -> None:
    failure = explain(OSError(code, os.strerror(code)))
    assert (failure.code, failure.kind) == (6, "resource")
    assert failure.message == f"can't write to stdout: {os.strerror(code)}"
    with pytest.raises(ResourceError) as caught, disk_errors(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert caught.value.message == f"can't write `{tmp_path / 'file'}`: {os.strerror(code)}"
    assert caught.value.hint == (None if code == errno.EIO else "free some disk space")


def test_an_error_is_told_where_there_is_no_memory_to_lay_it_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert Output().end(MemoryError()) == 6
    assert capsys.readouterr().err == f"error: out of memory\nhint: {HINT}\n"
