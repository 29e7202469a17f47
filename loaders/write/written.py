"""What only execution knows: hashes, seconds, peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WORK = ("read", "convert", "write", "hash")
"""The kinds of work, in the order of the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What only execution knows."""

    hashes: Mapping[str, str]
    """sha256 of each file, by its path."""
    seconds: Mapping[str, float]
    """What the workers spent their time on, added up over all of them: reading, converting, writing, hashing."""
    peak_anonymous_bytes: int
    """The largest anonymous memory of the process, libraries included, sampled while it wrote."""
    ranges_bytes: int = 0
    """What came from a hub by ranges."""
    compared: tuple[str, ...] = ()
    """The source's files of which that was all, in order, so that it could be compared with the hub's sha256."""

    @classmethod
    def all_of(cls, shares: Iterable[Mapping[str, Any]]) -> Written:
        """The shares of several processes (as dictionaries) together; the peak is that of the largest process."""
        shares = list(shares)
        return cls(
            hashes={path: digest for share in shares for path, digest in share["hashes"].items()},
            seconds={kind: sum(share["seconds"][kind] for share in shares) for kind in shares[0]["seconds"]},
            peak_anonymous_bytes=max(share["peak_anonymous_bytes"] for share in shares),
            ranges_bytes=sum(share["ranges_bytes"] for share in shares),
            compared=tuple(sorted({name for share in shares for name in share["compared"]})),
        )
