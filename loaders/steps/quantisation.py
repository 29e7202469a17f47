"""What a quantisation answers: how base weights are stored in fewer bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Encoder(Protocol):
    """Quantises pieces of a weight that begin at a block."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """bfloat16, float16 or float32 of any shape → codes (uint8, (n+1)//2), absmax (float32, one a block).

        The codes may lie in memory that the next call from the same thread uses again. Raises `ValueError` for NaN and
        infinity, which would spoil the whole weight without a word.
        """
        ...
