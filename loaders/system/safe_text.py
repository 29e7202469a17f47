"""Text from outside, made safe to show: no credentials in it, and no character that does more than be printed."""

from __future__ import annotations

import re
from collections.abc import Callable

_MASKS = (
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s]+@"), r"\1***@"),
    (re.compile(r"(://[^\s?`]*\?)[^\s`]+"), r"\1***"),
    (re.compile(r"hf_[A-Za-z0-9]{16,}"), "hf_***"),
)
"""In an address a name and password, then its query, which can be signed; anywhere a token of the Hugging Face hub."""


def masked(text: str, secret: str | None = None) -> str:
    """`text` with `***` in the place of credentials in addresses, of `secret`, and of what looks like a hub token."""
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    return text.replace(secret, "***") if secret else text


def one_line(text: str | None) -> str:
    """`text` on one line: a space in the place of each character that can't be printed."""
    # a name in a checkpoint can hold control characters, which must not reach a terminal
    return _printable(text or "", lambda character: " ").strip()


def escaped(text: str) -> str:
    """`text` on one line, to show what somebody typed: what can't be printed is escaped as Python's `repr` does."""
    return _printable(text, lambda character: repr(character)[1:-1])


def _printable(text: str, substitute: Callable[[str], str]) -> str:
    return "".join(character if character.isprintable() else substitute(character) for character in text)
