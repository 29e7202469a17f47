"""One thing that the doctor looked at, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "absent", "broken", "untried"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    detail: str
    """What was seen, or the reason."""
    mend: str | None = None
    """The command that fixes it, where there is one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What `detail` says, as JSON values."""

    @property
    def usable(self) -> bool:
        """Whether it works, as far as it was tried."""
        return self.state in ("ok", "untried")
