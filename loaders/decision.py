"""What is done otherwise than asked, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Something that is done otherwise than asked, or chosen where nothing was asked, and why."""

    what: str
    requested: str
    effective: str
    reason: str
