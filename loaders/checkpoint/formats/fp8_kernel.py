"""The inner loop of decoding FP8 and packed FP4, compiled by numba; `fp8.py` says what it computes."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(inline="always")
def _to_bfloat16(value):
    """The bits (uint16) of a float32, rounded to nearest, ties to even; no NaN has a payload that could overflow."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, error_model="numpy", cache=True)
def decode(codes, table, scales, out, column, columns, width):
    """Decode codes (uint8, n) of one scale row after another into `out` (uint16, n: bits of bfloat16).

    `table` (float32, 256) holds the value of each code. The first code stands in `column` of a row of `columns`; each
    row has its own scales, one for `width` columns: `scales` (float32, rows × ceil(columns / width)).
    """
    at = 0
    row = 0
    while at < codes.size:
        block = column // width
        end = min(at + min((block + 1) * width, columns) - column, codes.size)
        part, result, scale = codes[at:end], out[at:end], scales[row, block]
        for i in range(part.size):
            result[i] = _to_bfloat16(table[part[i]] * scale)
        column += end - at
        at = end
        if column == columns:
            column = 0
            row += 1


@njit(nogil=True, error_model="numpy", cache=True)
def unpack(packed, codes):
    """Two codes a byte, the first in the lower half: `packed` (uint8, n/2) → `codes` (uint8, n), which is returned."""
    for i in range(packed.size):
        codes[2 * i] = packed[i] & np.uint8(15)
        codes[2 * i + 1] = packed[i] >> np.uint8(4)
    return codes
