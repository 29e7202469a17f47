"""Files on a disk: made durable, hashed, and what to say when it fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import FtloadError, OutputError, ResourceError

_WRONG_PLACE = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT,
     errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ENOTEMPTY)
)  # fmt: skip


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Name the file when writing fails: `OutputError` where the place is wrong, `ResourceError` where the disk is."""
    try:
        yield
    except FtloadError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _WRONG_PLACE:
            raise OutputError(f"can't write `{path}`: {reason}", hint="choose another --output_dir") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"can't write `{path}`: {reason}", hint="free some disk space") from error
        raise ResourceError(f"can't write `{path}`: {reason}") from error


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
