"""Which experts of a fused 4-bit parameter can be taken out of it as slices of what is stored for all of them."""

from __future__ import annotations

from ..checkpoint.formats.nf4 import BLOCK, NESTED_BLOCK
from ..model.experts.fused import FusedExperts


def rows_in_blocks(fused: FusedExperts) -> bool:
    """Whether an expert is (out, in), of rows that are whole blocks: as bitsandbytes takes it."""
    return not fused.transposed and fused.in_features % BLOCK == 0


def nested_in_slices(fused: FusedExperts) -> bool:
    """Whether an expert's double-quantised absmax are a slice of all of them; else all are float32 once loaded."""
    return fused.experts == 1 or fused.in_features * fused.out_features % (BLOCK * NESTED_BLOCK) == 0
