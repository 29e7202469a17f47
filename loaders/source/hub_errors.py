"""What goes wrong between here and a hub: tried again where that helps, else reported in one line.

huggingface_hub's errors become `FtloadError`s here; no message shows a token or the credentials of a URL.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import FtloadError, ResourceError, SourceError, said_by
from ..system.safe_text import masked

T = TypeVar("T")

RETRY_AFTER_SECONDS = (1, 2)
_LONGEST_WAIT_SECONDS = 60
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
EXPIRED_STATUSES = (400, 401, 403, 404, 410)
"""How servers refuse a signed address that is no longer valid."""


def with_retries(call: Callable[[], T], received: Callable[[], int] = lambda: 0) -> T:
    """`call()`, tried again where the hub or the network fails for a moment.

    As long as `received` grows from one failure to the next, it gets on, and is tried again at once.
    """
    failures, before = 0, received()
    while True:
        try:
            return call()
        except (_http_error(), ConnectionError) as error:
            if not _is_passing(error):
                raise
            if received() > before:
                failures, before = 0, received()
                continue
            if failures == len(RETRY_AFTER_SECONDS):
                raise
            time.sleep(max(RETRY_AFTER_SECONDS[failures], _asked_to_wait(error)))
            failures += 1


def _is_passing(error: Exception) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # the library goes on with a download at its old address: what another server refuses, the hub has a new one for
        is_signed = not str(error.response.url).startswith(constants.ENDPOINT)
        return status in RETRIED_STATUSES or (is_signed and status in EXPIRED_STATUSES)
    # nobody is there: who has no network should not wait
    return type(error).__name__ not in ("ConnectError", "ConnectTimeout")


def _asked_to_wait(error: Exception) -> int:
    """The seconds of an answer's `Retry-After`, where it has one, and not for longer than anybody would."""
    response = getattr(error, "response", None)
    told = response.headers.get("Retry-After", "") if response is not None else ""
    return min(int(told), _LONGEST_WAIT_SECONDS) if told.isdecimal() else 0


class _Quiet:
    """Keeps the library from printing warnings, for as long as any thread is in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._level = logging.NOTSET

    def __enter__(self) -> None:
        logger = logging.getLogger("huggingface_hub")
        with self._lock:
            if not self._inside:
                self._level = logger.level
            self._inside += 1
            if logger.level == logging.WARNING:  # its default; anything else was asked for
                logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                logging.getLogger("huggingface_hub").setLevel(self._level)


_quiet = _Quiet()


@contextmanager
def hub_errors(model: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Around every call of huggingface_hub: turn what it raises into `FtloadError`s, and keep it from printing.

    Its warnings hold whole URLs, signatures included, and each failure that matters is raised as well.
    """
    try:
        with _quiet:
            yield
    except (_http_error(), OSError) as error:
        raise _translate(error, model, revision, file) from error
    except (RuntimeError, ValueError) as error:
        if file is None:
            raise
        # hf_xet's failures are RuntimeErrors; a file too large for plain HTTP is a ValueError
        raise _download_error(error, file) from error


def _translate(error: Exception, model: str, revision: str | None, file: str | None) -> FtloadError:
    """The library's error in one line, the most specific kind first."""
    from huggingface_hub import constants, errors

    endpoint = masked(constants.ENDPOINT)
    if isinstance(error, errors.GatedRepoError):
        hint = "accept the conditions on the model's page, then set `HF_TOKEN`"
        if _token():
            hint = "log in with the token's account and accept the conditions on the model's page"
        return SourceError(f"`{model}` is gated", hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the spelling, and set `HF_TOKEN` if it is private"
        if _token():
            hint = "check the spelling, and that the token may read it"
        return SourceError(f"`{model}` is neither a directory nor on the hub, or it is private", hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"`{model}` has no revision `{revision or 'main'}`", hint="give a branch, a tag or a commit")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return SourceError(f"`{model}` has no file `{file}` at `{revision or 'main'}`")
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _translate(error.__cause__, model, revision, file)
    if isinstance(error, errors.OfflineModeIsEnabled):
        what = f"`{file}` of `{model}`" if file else f"`{model}`, revision `{revision or 'main'}`,"
        return SourceError(
            f"{what} is not in the cache, and the hub is switched off",
            hint="unset `HF_HUB_OFFLINE`, or set `HF_HOME` to the cache that holds it",
        )
    if isinstance(error, errors.FileMetadataError):
        return not_a_hub()
    if isinstance(error, errors.HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        said = f" ({_said(error.server_message)})" if error.server_message else ""
        hint = "try again later"
        if error.response.status_code in (401, 403):
            hint = "check `HF_TOKEN`: it must be valid and allowed to read the model"
        of = f"`{file}` of `{model}`" if file else f"`{model}`"
        return SourceError(f"the hub answers `{status}` for {of}{said}", hint=hint)
    if isinstance(error, OSError):
        return _download_error(error, file or model)
    hint = "check the network and `HF_ENDPOINT`; `HF_HUB_OFFLINE=1` uses the cache alone"
    if file and not type(error).__name__.startswith("Connect"):
        return _download_error(error, file)
    return SourceError(f"can't reach the hub at `{endpoint}`: {_said(error)}", hint=hint)


def _download_error(error: Exception, file: str) -> FtloadError:
    from huggingface_hub import constants

    text = str(error)
    hint = f"the cache is `{constants.HF_HUB_CACHE}`; `HF_HOME` moves it"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text:
        return ResourceError(f"no space left on the disk to download `{file}`", hint=hint)
    # only an error of the file system carries a path: the cache's
    if isinstance(error, OSError) and error.filename:
        return SourceError(f"can't use `{error.filename}`: {error.strerror}", hint=hint)
    again = "run the same command again: files that are complete are kept"
    # where the size is wrong, the library says the end of the address too, which is its signature
    said = re.sub(r"(?<=^Consistency check failed: )(.*?) \(.*", r"\1", _said(error))
    return SourceError(f"the download of `{file}` failed: {said}", hint=again)


def not_a_hub() -> SourceError:
    """The error for an endpoint where something answers that is no hub."""
    from huggingface_hub import constants

    hint = "check `HF_ENDPOINT`, proxy and network: a login page may be answering"
    return SourceError(f"`{masked(constants.ENDPOINT)}` does not answer like a hub", hint=hint)


def _http_error() -> type[Exception]:
    """The base class of the HTTP library's errors: httpx's for huggingface_hub 1, httpx2's for 2."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]


def is_outage(error: BaseException | None) -> bool:
    """Whether the hub could not answer, as opposed to refusing."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED_STATUSES
    return isinstance(error, (_http_error(), OfflineModeIsEnabled))


def _said(error: BaseException | str) -> str:
    """What the library or the hub says, without the token, which either may repeat."""
    return masked(said_by(error), _token())


def _token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except OSError:  # it may be in a file
        return None
