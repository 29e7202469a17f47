"""A source: a model's files, wherever they are, and how to get them, whole or in part."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

from ..errors import CheckpointError, SourceError
from .hub_download import download_file, download_range, remember_revision
from .license import License

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a model."""

    path: str
    """Relative to the root, with `/`."""
    bytes: int
    sha256: str | None
    """As the hub states it, which it does for large files only; not checked here."""
    mtime_ns: int | None = None
    """When a local file was last changed, as it was listed; what a hub's cache holds never changes."""


class ReadInto(Protocol):
    """Reads a part of a file."""

    def __call__(self, view: memoryview, name: str, begin: int, /) -> None:
        """Fill `view` with the bytes of a file from `begin` on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's files, and how to get them, whole or in part."""

    model: str
    """As the user gave it."""
    kind: Literal["local", "hub", "gguf"]
    revision: str | None
    """As the user asked for it. It means nothing for a local model."""
    commit: str | None
    """40 hex digits; None unless on a hub."""
    root: Path
    """The directory, absolute. On a hub: the cache's snapshot of the commit, where fetched files appear."""
    files: tuple[SourceFile, ...]
    """The top level and `additional_chat_templates/`, sorted; of a GGUF model, that file alone."""
    gguf_file: str | None = None
    """The name of the GGUF file in `root`."""
    adapters: tuple[str, ...] = ()
    """Where the directory or repository holds adapters too: the paths of their adapter_config.json."""
    from_cache: bool = False
    """The hub could not be asked, so `files` is what the cache happens to hold."""
    license: License | None = None
    """As the hub tells it, or a local model's README.md."""
    notes: tuple[str, ...] = ()
    """What the user should be warned of."""
    cached: bool = True
    """Whether weights from a hub may lie in its cache, or are read by ranges and never lie on this disk."""
    wait: Callable[[str], None] | None = None
    """Waits for a file that is on its way to the cache, where some are."""
    read_remote: ReadInto | None = None
    """Reads weights that are on their way and come to lie nowhere, where some are."""
    at_work: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around what reads and goes on to read: see `blocks.py`."""

    def fetch(self, names: Iterable[str], on_progress: Callable[[int], None] | None = None) -> None:
        """Make the files exist under `root`; those of a local model do already.

        `on_progress` is called with the bytes since its last call, perhaps from another thread. Their sum is the size
        of the files: a cached file counts at once, and a download that is started again takes its bytes back.
        Raises `SourceError`, or `ResourceError` when the disk is full; complete files stay.
        """
        if self.commit is None:
            return
        files = {file.path: file for file in self.files}
        for name in dict.fromkeys(names):
            if name not in files:
                where = "in the cache" if self.from_cache else f"at commit {self.commit}"
                raise SourceError(f"`{self.model}` has no file `{name}` {where}")
            if not (self.root / name).exists():
                download_file(self.model, self.commit, name, files[name].bytes, on_progress)
                remember_revision(self.root.parent.parent, self.revision or "main", self.commit)
            elif on_progress:
                on_progress(files[name].bytes)

    def place(self, name: str) -> Path | None:
        """Where a file lies, once it has arrived; None for one that comes to lie nowhere."""
        if self.wait is not None:
            self.wait(name)
        path = self.root / name
        return None if self.read_remote is not None and not path.exists() else path

    def is_here(self, names: Iterable[str]) -> bool:
        """Whether all of these files exist under `root`."""
        return all((self.root / name).exists() for name in names)

    @property
    def blobs(self) -> Path:
        """Where the hub's cache has the contents of a repository's files, whichever commit they are of."""
        return self.root.parent.parent / "blobs"

    def unfetched_bytes(self, names: Iterable[str]) -> int:
        """What the hub's cache still lacks of these files; 0 of a local model."""
        wanted = frozenset(names) if self.commit is not None else frozenset()
        return sum(
            file.bytes
            for file in self.files
            if file.path in wanted
            and not self.is_here([file.path])
            and not (file.sha256 is not None and (self.blobs / file.sha256).exists())
        )

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes `begin` (first) to `end` (exclusive) of a file.

        Of a file that was not fetched, only these bytes are downloaded. Raises `SourceError`, or `CheckpointError` if
        the file is shorter.
        """
        data = bytearray(end - begin)
        self.read_into(memoryview(data), name, begin)
        return bytes(data)

    def read_into(self, view: memoryview, name: str, begin: int) -> None:
        """Fill `view` with the bytes of a file from `begin` on; otherwise as `read`."""
        with self.opened(name) as read:
            read(view, begin)

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[memoryview, int], None]]:
        """A function that fills a view with the bytes of a file, from a place on; otherwise as `read`."""
        path = self.place(name)
        if path is None:
            assert self.read_remote is not None
            remote = self.read_remote
            yield lambda view, begin: remote(view, name, begin)
            return
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            if self.commit is None:
                raise SourceError(f"`{path}` is missing") from error
            yield partial(self._download, name)
            return
        except OSError as error:
            raise _unreadable(path, error) from error
        with file:
            yield partial(_fill, file, name, path)

    def file(self, name: str) -> BinaryIO:
        """A file to read and seek in. Of one that was not fetched, only what is read is downloaded."""
        path = self.root / name
        if path.exists():
            try:
                return path.open("rb")
            except OSError as error:
                raise _unreadable(path, error) from error
        size = next(file.bytes for file in self.files if file.path == name)
        return io.BufferedReader(_FileOfSource(self, name, size), _FILE_BUFFER_BYTES)

    def _download(self, name: str, view: memoryview, begin: int) -> None:
        assert self.commit is not None
        data = download_range(self.model, self.commit, name, begin, begin + len(view))
        view[: len(data)] = data
        _check_count(name, begin, len(data), len(view))

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise `CheckpointError` for a file whose size or time of modification is not what it was when listed.

        For after the last read: if it returns, all that was read is of one state.
        """
        files = {file.path: file for file in self.files}
        for name in names:
            path, listed = self.root / name, files[name]
            try:
                found = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from error
            if found.st_size != listed.bytes or listed.mtime_ns not in (None, found.st_mtime_ns):
                raise CheckpointError(
                    f"`{path}` changed while it was read", hint="run it again when nothing writes to it"
                )


_FILE_BUFFER_BYTES = 256 * 1024
"""Of a file that is read here and there: each time one request."""


class _FileOfSource(io.RawIOBase):
    """Reads at a position, from wherever the source has the file."""

    def __init__(self, source: Source, name: str, size: int) -> None:
        self._source = source
        self._name = name
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._size - self._position)]
        if view:
            self._source.read_into(view, self._name, self._position)
        self._position += len(view)
        return len(view)


def _fill(file: io.FileIO, name: str, path: Path, view: memoryview, begin: int) -> None:
    count = 0
    try:
        file.seek(begin)
        while count < len(view) and (more := file.readinto(view[count:])):
            count += more
    except OSError as error:
        raise _unreadable(path, error) from error
    _check_count(name, begin, count, len(view))


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"can't read `{path}`: {error.strerror or error}")


def _check_count(name: str, begin: int, count: int, wanted: int) -> None:
    if count != wanted:
        raise CheckpointError(
            f"`{name}` ends after {begin + count} bytes, before byte {begin + wanted}",
            hint="the file is incomplete: get it again",
        )
