"""Taking over a whole file: linked, cloned or copied by the kernel, or from a hub, and hashed while it is copied."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..checkpoint.finite import check_finite
from ..checkpoint.tensors import TORCH_NAMES, TensorMeta
from ..errors import CheckpointError, SourceError
from ..system.durable import start_writing_back

_FICLONE = 0x40049409
"""The ioctl that makes one file share another's blocks (ioctl_ficlone(2)): btrfs, XFS, bcachefs …"""
_PIECE_BYTES = 16 * 1024 * 1024
_HELD_BYTES = 1024 * 1024
"""What a copy holds in memory where the kernel can't copy by itself."""
_HASHED_BYTES = 1024 * 1024
"""What is read and hashed at once: a multiple of every dtype's size."""


class FileCopy:
    """A copy of one file, and its hash, for two threads: one copies, the other follows and reads what was written."""

    def __init__(
        self, source: Path, target: Path, size: int, tensors: Iterable[TensorMeta], advance: Callable[[int], None]
    ) -> None:
        self.target = target
        self._tensors = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
        self._source = source
        self._size = size
        self._advance = advance
        self._copied = 0
        self._durable = False
        self._failed = False
        self._changed = threading.Condition()

    def link(self) -> None:
        """Make the target a second name of the source file itself."""
        with self._telling():
            os.link(self._source.resolve(), self.target)
            self._copied_until(self._size)

    def copy(self) -> None:
        """Clone the file where the file system can, else let the kernel copy it; then make it durable.

        Raises `CheckpointError` when the source turns out to be shorter than its listing.
        """
        with self._telling(), self._open_source() as source, self.target.open("xb") as target:
            if _clone(source.fileno(), target.fileno()):
                self._copied_until(self._size)
            while self._copied < self._size:
                count = self._copy_piece(source.fileno(), target.fileno())
                start_writing_back(target.fileno(), self._copied, count)
                self._copied_until(self._copied + count)
            os.fsync(target.fileno())

    def receive(self, read: Callable[[memoryview, int], None]) -> None:
        """Write what `read` fills views with, from a place on; then make it durable."""
        buffer = memoryview(bytearray(min(_HELD_BYTES, self._size)))
        with self._telling(), self.target.open("xb") as target:
            while self._copied < self._size:
                piece = buffer[: self._size - self._copied]
                read(piece, self._copied)
                target.write(piece)
                target.flush()
                start_writing_back(target.fileno(), self._copied, len(piece))
                self._copied_until(self._copied + len(piece))
            os.fsync(target.fileno())

    def hash(self) -> str:
        """The sha256 of the target, read as far as it is written, once it is durable; empty when the copy failed.

        What is read anyway is looked at: raises `CheckpointError` naming a tensor that holds NaN or infinity.
        """
        import torch

        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_HASHED_BYTES))
        if not self._reaches(1):
            return ""
        with self.target.open("rb", buffering=0) as target:
            for begin, end, tensor in self._pieces():
                if not self._reaches(end):
                    return ""
                piece = left = buffer[: end - begin]
                while left:
                    count = target.readinto(left)
                    if not count:
                        raise CheckpointError(f"`{self._source}` became shorter while it was copied")
                    left = left[count:]
                digest.update(piece)
                if tensor is not None:
                    values = torch.frombuffer(piece, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
                    check_finite(values, values, tensor)
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._durable)
        return "" if self._failed else digest.hexdigest()

    def _reaches(self, position: int) -> bool:
        """Wait until the copy has come so far; whether it has, and did not fail."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._copied >= position)
            return not self._failed

    def _pieces(self) -> Iterator[tuple[int, int, TensorMeta | None]]:
        """First byte, end and tensor of what is hashed at once: whole elements of a tensor, or what lies before one."""
        position = 0
        for tensor in self._tensors:
            for first, end, owner in ((position, tensor.begin, None), (tensor.begin, tensor.end, tensor)):
                for begin in range(first, end, _HASHED_BYTES):
                    yield begin, min(begin + _HASHED_BYTES, end), owner
            position = tensor.end
        for begin in range(position, self._size, _HASHED_BYTES):
            yield begin, min(begin + _HASHED_BYTES, self._size), None

    def _open_source(self) -> BinaryIO:
        try:
            return self._source.open("rb")
        except OSError as error:
            raise SourceError(f"can't read `{self._source}`: {error.strerror or error}") from error

    def _copy_piece(self, source: int, target: int) -> int:
        begin = self._copied
        count = min(_PIECE_BYTES, self._size - begin)
        try:
            copied = os.copy_file_range(source, target, count, begin, begin)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            copied = os.pwrite(target, os.pread(source, min(count, _HELD_BYTES), begin), begin)
        if not copied:
            raise CheckpointError(f"`{self._source}` became shorter while it was copied")
        return copied

    def _copied_until(self, position: int) -> None:
        self._advance(position - self._copied)
        with self._changed:
            self._copied = position
            self._changed.notify_all()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Around what makes the copy: who follows learns how it ended."""
        try:
            yield
        except BaseException:
            self.fail()
            raise
        with self._changed:
            self._durable = True
            self._changed.notify_all()

    def fail(self) -> None:
        """Let who follows know that nothing more comes."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


def link_problem(source: Path, directory: Path) -> str | None:
    """Why a file can't get a second name in `directory`; None when it can."""
    name = directory / ".link"
    try:
        os.link(source.resolve(), name)
    except OSError as error:
        return f"the file system says: {error.strerror}"
    name.unlink()
    return None


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        # file systems that can't clone fail in many ways; what is really wrong, copying reports
        return False
    return True
