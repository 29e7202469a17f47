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
        requested, effective = self.shown
        return f"{self.what}: " + (effective if requested == effective else f"{requested} → {effective}")

    @property
    def shown(self) -> tuple[str, str]:
        """What was asked for and what it came to, for people: of a long list of names, some."""
        return _shortened(self.requested), _shortened(self.effective)


def _shortened(text: str) -> str:
    names = text.split()
    return text if len(names) <= _MOST_NAMES else f"{' '.join(names[:3])} … {names[-1]} ({len(names)} names)"


_MOST_NAMES = 16
