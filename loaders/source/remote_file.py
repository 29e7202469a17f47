"""Ranges of a file on a hub, straight into memory: a transfer that breaks goes on, an address that expires is renewed.

A hub answers for a large file with a signed address on another server, valid for a while: it is asked for once, and
used for every range until it is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError, SourceError
from .hub_download import asked_for_range
from .hub_errors import EXPIRED_STATUSES, hub_errors, not_a_hub, with_retries
from .source import SourceFile

_RECEIVED_BYTES = 512 * 1024
"""What is taken from a connection at once."""


class RemoteFile:
    """One file of a commit, for several threads."""

    def __init__(self, model: str, commit: str, file: SourceFile) -> None:
        self._model = model
        self._commit = commit
        self._file = file
        self._lock = threading.Lock()
        self._address: str | None = None
        self._tag: str | None = None
        """What the server that has the file calls its state."""

    def fill(self, view: memoryview, begin: int, on_received: Callable[[int], None]) -> None:
        """Fill `view` with the bytes from `begin` on; `on_received` is told of each piece, in order, once it is there.

        What arrived before a connection broke is not asked for again. Raises `SourceError`, also for a server that
        knows no ranges, and `CheckpointError` if the file is not the one that was listed.
        """
        received = 0

        def go_on() -> None:
            nonlocal received
            with self._answer(begin + received, begin + len(view)) as answer:
                for piece in _body(answer, len(view) - received):
                    view[received : received + len(piece)] = piece
                    received += len(piece)
                    on_received(len(piece))

        with hub_errors(self._model, self._commit, self._file.path):
            with_retries(go_on, lambda: received)

    @contextmanager
    def _answer(self, begin: int, end: int) -> Iterator[Any]:
        """The server's answer for a range, checked, its body not read yet."""
        from huggingface_hub.utils import hf_raise_for_status

        wanted = self._model, self._commit, self._file.path, begin, end
        if self._address is not None:
            with asked_for_range(*wanted, address=self._address) as answer:
                if answer.status_code not in EXPIRED_STATUSES:
                    hf_raise_for_status(answer)
                    self._check(answer, begin, end, renewed=False)
                    yield answer
                    return
        with asked_for_range(*wanted) as answer:
            hf_raise_for_status(answer)
            self._check(answer, begin, end, renewed=True)
            self._address = str(answer.url) if answer.history else None
            yield answer

    def _check(self, answer: Any, begin: int, end: int, *, renewed: bool) -> None:
        """Raise an error unless this is the range, of the file that was listed."""
        name, size = self._file.path, self._file.bytes
        if answer.status_code == 200:
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise not_a_hub()
            if (begin, end) != (0, size):
                raise SourceError(
                    f"the server that has `{name}` sends no ranges of it",
                    hint="leave out --source_cache none: the whole file is downloaded then",
                )
        length = answer.headers.get("Content-Length", size)  # a body in chunks has none
        told = answer.headers.get("Content-Range", f"bytes 0-{size - 1}/{length}")
        if told != f"bytes {begin}-{end - 1}/{size}":
            raise _changed(name, f"the server sends `{told}` of a file of {size} bytes")
        linked = {first.headers.get("X-Linked-Etag", "").strip('"') for first in answer.history}
        if self._file.sha256 is not None and not linked <= {"", self._file.sha256}:
            raise _changed(name, "its sha256 is another one than the hub listed")
        tag = answer.headers.get("ETag")
        with self._lock:
            if renewed:
                self._tag = tag
            elif tag != self._tag:
                raise _changed(name, "the server has another state of it than before")


def _changed(name: str, how: str) -> CheckpointError:
    return CheckpointError(f"`{name}` changed on the hub: {how}", hint="run it again")


def _body(answer: Any, count: int) -> Iterator[bytes]:
    """The body's bytes, `count` in all.

    Past the first piece they are taken from the connection itself (httpx's documentation, "Network streams"): once the
    length is known, its parser would only hold the interpreter's lock, for two thirds of the time.
    """
    from huggingface_hub import constants

    connection = answer.extensions.get("network_stream")
    plain = answer.http_version == "HTTP/1.1" and "Transfer-Encoding" not in answer.headers
    for piece in answer.iter_raw():
        piece = piece[:count]  # some send more than they say
        yield piece
        count -= len(piece)
        while connection is not None and plain and count > 0:
            try:
                piece = connection.read(min(count, _RECEIVED_BYTES), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            except Exception as error:  # the errors of the library below httpx, which has its own for each
                raise ConnectionError(str(error)) from error
            if not piece:
                raise ConnectionError(f"the connection ended {count} bytes early")
            yield piece
            count -= len(piece)
        if count <= 0:
            return
    raise ConnectionError(f"the connection ended {count} bytes early")
