"""The GPUs that `ftload plan --fit` names: how many, and the memory that each is sold with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError
from .declared import parse_size
from .values import printable

MOST_GPUS = 100_000
"""More than train any model: a larger number is a slip."""
_GPUS = re.compile(r"(?:([0-9]{1,9})[xX×])?([0-9]+(?:\.[0-9]+)? *(?:[KMGT]I?B?|B))", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """One GPU, or several that FSDP divides the states of training among."""

    count: int | None
    """None where none is named, as in `24GB`."""
    size: str
    """The memory of each, as it was typed."""
    bytes: int
    """The same."""

    def __str__(self) -> str:
        return self.size if self.count is None else f"{self.count}x{self.size}"


def parse_gpus(text: str) -> Gpus:
    """Return what a text such as `24GB` or `2x80GB` means, in the units of `parse_size`: 24GB are 24 · 10^9 bytes.

    Raises:
        UsageError: it means nothing.
    """
    match = _GPUS.fullmatch(text.strip())
    hint = "write the memory that a GPU is sold with, `24GB`, or `2x80GB` for FSDP on two"
    if match is None:
        raise UsageError(f"`{printable(text)}` is not the size of a GPU", hint=hint)
    count = None if match[1] is None else int(match[1])
    if count is not None and not 1 <= count <= MOST_GPUS:
        raise UsageError(f"`{printable(text)}` are {count:,} GPUs, not 1 to {MOST_GPUS:,}", hint=hint)
    try:
        return Gpus(count=count, size=match[2], bytes=parse_size(match[2]))
    except UsageError as error:
        raise UsageError(error.message, hint=hint) from error
