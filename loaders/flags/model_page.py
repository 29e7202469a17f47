"""The address of a model's page on the hub, read as the repository that the page shows."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from ..errors import SourceError, UsageError
from ..system.safe_text import masked

_PAGE = re.compile(r"/(?P<model>[^/]+(/[^/]+)?)(/tree/(?P<revision>[^/]+))?/?")


def repository_of(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return the model and its revision; for `https://HUB/ORG/NAME[/tree/REVISION]` these are in the address.

    HUB is the hub that huggingface_hub asks (`HF_ENDPOINT`). A `model` that is no address is returned as it is.

    Raises:
        SourceError: `model` is another address.
        UsageError: the address and `revision` name two revisions.
    """
    if not model.startswith(("https://", "http://")):
        return model, revision
    check_endpoint()
    from huggingface_hub import constants

    try:
        hub, page = urlsplit(constants.ENDPOINT), urlsplit(model)
    except ValueError:  # brackets that hold no IPv6 address
        page = hub = urlsplit("")
    top = hub.path.rstrip("/")
    is_there = page.netloc.lower() == hub.netloc.lower() and page.path.startswith(f"{top}/")
    found = _PAGE.fullmatch(page.path, len(top)) if is_there else None
    if found is None:
        raise SourceError(
            f"`{masked(model)}` is not the address of a model's page on `{masked(constants.ENDPOINT)}`",
            hint="give `organisation/name`, a directory or a .gguf file",
        )
    shown = unquote(found["revision"]) if found["revision"] else None
    if shown and revision and shown != revision:
        raise UsageError(
            f"`{masked(model)}` and the revision `{revision}` are of two revisions", hint="give one of them"
        )
    return unquote(found["model"]), shown or revision


def check_endpoint() -> None:
    """Raise `UsageError` for an `HF_ENDPOINT` with which huggingface_hub could not even be imported."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if not endpoint:
        return
    try:
        url = urlsplit(endpoint)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # the port is no number
        is_url = False
    if not is_url:
        raise UsageError(f"`HF_ENDPOINT` is `{masked(endpoint)}`, which is not an http(s) URL")
