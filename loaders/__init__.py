"""What ftload does, without a command line: plan, prepare and load what was prepared."""

from .prepared import load_prepared

__all__ = ["load_prepared"]
