"""What no message and no report may show: credentials in what users, environments and other libraries say."""

from __future__ import annotations

import re

_MASKS = (
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s]+@"), r"\1***@"),
    (re.compile(r"(://[^\s?`]*\?)[^\s`]+"), r"\1***"),
    (re.compile(r"hf_[A-Za-z0-9]{16,}"), "hf_***"),
)
"""In an address a name and password, then its query, which can be signed; anywhere a token of the Hugging Face hub."""


def masked(text: str) -> str:
    """`text` with `***` in the place of credentials in addresses, and of what looks like a token of the hub."""
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    return text
