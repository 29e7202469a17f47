"""What ftload does, without a command line: plan, prepare and load what was prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import load_prepared

__all__ = ["load_prepared"]


def __getattr__(name: str) -> Any:
    # model cards of ftload 0.1 say so; on first use, as the command line imports this package too
    if name in __all__:
        from .load import load_prepared

        return load_prepared
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
