"""Bytes from a hub: whole files into its cache, or a range of one into memory.

All that talks to a hub is in this file, remote_file.py and hub.py, through huggingface_hub, which honours `HF_TOKEN`,
`HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` itself; hub_errors.py wraps each call, with the repository and the file.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .hub_errors import hub_errors, with_retries


def download_file(model: str, commit: str, name: str, size: int, on_progress: Callable[[int], None] | None) -> None:
    """Download a file of `size` bytes into the cache, under its commit. `on_progress` as in `Source.fetch`.

    Not `snapshot_download`, which downloads files in parallel: an interrupt, or the error of one file, waits there
    until all files that have begun are complete, and the error doesn't name its file.
    """
    from huggingface_hub import hf_hub_download

    arrived = 0

    def count(number: int) -> None:
        nonlocal arrived
        arrived += number
        if on_progress and number:
            on_progress(number)

    def get() -> Path:
        count(-arrived)
        return Path(hf_hub_download(model, name, revision=commit, tqdm_class=_progress_class(count)))

    with hub_errors(model, commit, name):
        path = with_retries(get)
    count(size - arrived)  # a file that another commit has in the cache too is not downloaded
    found = path.stat().st_size
    if found != size:
        raise SourceError(f"`{name}` has {found} bytes, the hub lists it with {size}")


@contextmanager
def asked_for_range(
    model: str, commit: str, name: str, begin: int, end: int, *, address: str | None = None
) -> Iterator[Any]:
    """A server's answer when it is asked for the bytes `begin` (first) to `end` (exclusive), its body not read yet.

    A response of httpx, or of httpx2. With an `address`, where the hub said that the file is: that gets no token.
    """
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = address or hf_hub_url(model, name, revision=commit)
    headers = {} if address else build_hf_headers()
    headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        yield answer


def download_range(model: str, commit: str, name: str, begin: int, end: int) -> bytes:
    """The bytes `begin` (first) to `end` (exclusive) of a file, fewer if it is shorter; only they are downloaded."""
    from huggingface_hub.utils import hf_raise_for_status

    if begin == end:
        return b""

    def get() -> bytes:
        with asked_for_range(model, commit, name, begin, end) as response:
            hf_raise_for_status(response)
            # a server that knows no ranges sends the file from its start: stop where the range ends
            skip = 0 if response.status_code == 206 else begin
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + end - begin:
                    break
            return bytes(data[skip : skip + end - begin])

    with hub_errors(model, commit, name):
        return with_retries(get)


def remember_revision(repository: Path, revision: str, commit: str) -> None:
    """Note the commit under the revision's name, so that it is found offline.

    The layout is huggingface_hub's (its guide "Understand caching"): `refs/<revision>` holds the commit. The library
    writes it when it downloads by a branch's name, where each file could be of another commit, and in
    `HfApi.resolve_revision`, which asks once more, waits without a limit, and doesn't tell the hub's answer from the
    cache's.
    """
    if revision == commit:
        return
    ref = repository / "refs" / revision
    try:
        if ref.is_file() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        # renamed into place: another process may be reading it
        temporary = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(commit)
        temporary.replace(ref)
    except OSError:
        return  # a convenience: a cache that can't be written still serves this run


def _progress_class(on_progress: Callable[[int], None]) -> type[Any]:
    """The library's hook for progress is the class of a progress bar: this one draws nothing and reports the bytes."""
    from tqdm import tqdm

    class Progress(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub's own, which tqdm refuses
            super().__init__(*args, **{**options, "disable": True})
            self.update(options.get("initial"))  # kept from an earlier run

        def update(self, n: float | None = 1) -> None:
            on_progress(int(n or 0))

        # with these, a download by hf_xet has one bar, not one for the network and one for the disk
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
            pass

    return Progress
