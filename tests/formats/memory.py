"""What decoding allocates, measured."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

from ..loaders.test_activations import measured_peak


def decoding_peak(decode: Callable[[], None]) -> int:
    """The largest sum of torch's own memory, and what the interpreter's objects hold, in bytes."""
    tracemalloc.start()
    try:
        peak = measured_peak(decode)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        decode()
        return peak + tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
