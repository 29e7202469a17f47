"""The inner loops of MXFP4 decoding, compiled by numba; `mxfp4.py` says what they compute.

A code is a sign and a magnitude k of three bits, worth 0, 0.5, 1, 1.5, 2, 3, 4 and 6: from k = 2 on, two bits of
exponent and one of mantissa. Times 2^(scale - 127) the value is exactly a bfloat16, whose bits follow by integer
arithmetic, 16 or 32 at a time: 64 k + 128 (scale - 1) where that is normal, 32 k where it is not (scale 0, k < 4), and
infinity where it is too large; for k of 0 and 1, k times the bits of 0.5 · 2^(scale - 127). The matrix is transposed on
the way, block after block: a column of codes and the two rows that it makes stay in a processor's cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_BYTES = 16
"""Of a block."""
_EXPONENT = np.uint16(128)
"""One more in a bfloat16's exponent doubles it."""
_LARGEST = np.uint16(0x7F80 + 128)
"""Infinity, with an exponent that is one too large."""


@njit(inline="always")
def _bits(code, exponent, half):
    """The bits of a bfloat16: code (uint16, 4 bits), 128 · scale, and the bits of 0.5 · 2^(scale - 127)."""
    k = np.uint16(code & np.uint16(7))
    # the exponent is one too large until the end: nothing is negative
    normal = np.uint16(np.uint16(k << np.uint16(6)) + exponent)
    subnormal = np.uint16(np.uint16(k << np.uint16(5)) + _EXPONENT)
    from_1_on = np.uint16(min(max(normal, subnormal), _LARGEST) - _EXPONENT)
    magnitude = from_1_on if k >= np.uint16(2) else np.uint16(k * half)
    return np.uint16(magnitude | np.uint16((code & np.uint16(8)) << np.uint16(12)))


@njit(nogil=True, error_model="numpy", cache=True)
def decode_transposed(blocks, scales, values, first_group, first):
    """Decode some rows of an expert, from the block `first_group` on, into as many columns from the column `first` on.

    `blocks` (uint8, rows × in/32 × 16), `scales` (uint8, rows × in/32, below 255) → `values` (uint16: the bits of
    bfloat16, a part of in × out).
    """
    rows = scales.shape[0]
    codes = np.empty((_BYTES, rows), np.uint8)
    exponents = np.empty(rows, np.uint16)
    halves = np.empty(rows, np.uint16)
    for group in range(values.shape[0] // (2 * _BYTES)):
        for row in range(rows):
            scale = np.int32(scales[row, first_group + group])
            exponents[row] = scale << 7
            halves[row] = (scale - 1) << 7 if scale > 1 else 32 << scale
            for byte in range(_BYTES):
                codes[byte, row] = blocks[row, first_group + group, byte]
        for byte in range(_BYTES):
            pairs = codes[byte]
            low = values[2 * (group * _BYTES + byte), first : first + rows]
            high = values[2 * (group * _BYTES + byte) + 1, first : first + rows]
            for row in range(rows):
                pair = np.uint16(pairs[row])
                low[row] = _bits(np.uint16(pair & np.uint16(15)), exponents[row], halves[row])
                high[row] = _bits(np.uint16(pair >> np.uint16(4)), exponents[row], halves[row])
