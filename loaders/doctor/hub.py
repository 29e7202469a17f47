"""Whether the hub can be reached, and whether it accepts the token that is stored here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from .finding import Finding

_OFFLINE = "models are taken from the cache, or from a directory: --model DIR"
_WORK_OFFLINE = "export HF_HUB_OFFLINE=1  # cache, or --model DIR"


def hub_setting(name: str) -> Any:
    """One of huggingface_hub's constants; None where the library can't be imported."""
    try:
        from huggingface_hub import constants
    except Exception:  # a malformed HF_ENDPOINT, or a broken installation: the probe reports it
        return None
    return getattr(constants, name, None)


def look_at_hub(answer: Mapping[str, Any] | None, *, offline: bool | None) -> Iterator[Finding]:
    """The hub and the token for it; `answer` is that of the hub's probe, None where it did not run."""
    if offline:
        detail = f"switched off by `HF_HUB_OFFLINE`: {_OFFLINE}"
        yield Finding(name="hub", state="absent", detail=detail, mend="unset HF_HUB_OFFLINE")
    elif answer is None:
        yield Finding(name="hub", state="untried", detail="not asked")
    elif "problem" in answer:
        yield Finding(
            name="hub", state="broken", detail=f"{answer['problem']}; without a network, {_OFFLINE}", mend=_WORK_OFFLINE
        )
    else:
        yield Finding(name="hub", state="ok", detail=answer["detail"])
    place = _token_place()
    if place is None:
        yield Finding(
            name="token", state="absent", detail="none: gated and private models need one", mend="hf auth login"
        )
        return
    accepted = (answer or {}).get("accepted")
    shown = f"*** in {place}"
    if accepted is False:
        fix = "unset HF_TOKEN" if place == "HF_TOKEN" else "hf auth login --force"
        detail = f"{shown}: the hub refuses it, for public models too"
        yield Finding(name="token", state="broken", detail=detail, mend=fix)
    elif accepted:
        yield Finding(name="token", state="ok", detail=f"{shown}, accepted by the hub")
    else:
        yield Finding(name="token", state="untried", detail=shown)


def _token_place() -> str | None:
    """Where a token is kept; the token itself goes nowhere."""
    try:
        from huggingface_hub import constants, get_token

        if get_token() is None:
            return None
    except Exception:  # as in `hub_setting`, or a file that can't be read
        return None
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
