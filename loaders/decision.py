"""What is done otherwise than asked, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Something that is done otherwise than asked, or chosen where nothing was asked, and why."""

    what: str
    requested: str
    """What was asked for, or what was found where nothing was asked."""
    effective: str
    reason: str

    @property
    def news(self) -> str:
        """What changes: `pad token: <|im_end|> → <pad> (id 49152)`; where nothing does, how it is."""
        change = f"{self.requested} → " if self.requested != self.effective else ""
        return f"{self.what}: {change}{self.effective}"
