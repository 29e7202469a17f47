"""The inner loops of decoding FP8 and packed FP4, compiled by numba; `fp8.py` says what they compute.

A small float becomes a float32 when its magnitude is shifted to where that has its mantissa, and the difference of both
biases is added to the exponent. Where its exponent is 0 there is no leading one to its mantissa: it is decoded with the
exponent 1, and what the one is worth is taken off again. So all codes take the same few instructions, of which the
compiler makes vector code, and none of them is slow: products with subnormal float32 are, on some processors.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def _decoder(*, bits, mantissa, bias, special):
    """A decoder for floats of so many `bits`, so many of them `mantissa`, and an exponent with this `bias`.

    Magnitudes from `special` on are NaN or infinity, as a float32 with their mantissa and the highest exponent.
    """
    # constants of the compiled code: with variables in their place it takes twice the time
    sign, to_sign = np.uint32(1 << (bits - 1)), np.uint32(32 - bits)
    shift, normal = np.uint32(23 - mantissa), np.uint32(1 << mantissa)
    rebias, least = np.uint32((127 - bias) << 23), np.float32(2.0 ** (1 - bias))

    @njit(nogil=True, error_model="numpy", cache=True)
    def decode(codes, scales, out, column, columns, width):
        """Decode codes (uint8, n) of one row after another into `out` (uint16, n: bits of bfloat16).

        The first code stands in `column` of a row of `columns`; each row has its own scales, one for `width` columns:
        `scales` (float32, finite, rows × ceil(columns / width)).
        """
        at = 0
        row = 0
        while at < codes.size:
            block = column // width
            end = min(at + min((block + 1) * width, columns) - column, codes.size)
            part, result, scale = codes[at:end], out[at:end], scales[row, block]
            for i in range(part.size):
                code = np.uint32(part[i])
                magnitude = np.uint32(code & (sign - np.uint32(1)))
                is_small = np.uint32(magnitude < normal)
                is_special = np.uint32(0) - np.uint32(magnitude >= special)
                wide = np.uint32((magnitude << shift) + rebias + (is_small << np.uint32(23)))
                wide = np.uint32(wide | (is_special & np.uint32(0x7F800000))).view(np.float32)
                value = np.float32(wide - np.float32(is_small) * least).view(np.uint32)
                signed = np.uint32(value | ((code & sign) << to_sign)).view(np.float32)
                product = np.float32(signed * scale).view(np.uint32)
                # to the nearest bfloat16, ties to even; no NaN has a payload that could overflow
                result[i] = (product + np.uint32(0x7FFF) + ((product >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            column += end - at
            at = end
            if column == columns:
                column = 0
                row += 1

    return decode


decode_e4m3 = _decoder(bits=8, mantissa=3, bias=7, special=0x7F)
decode_e5m2 = _decoder(bits=8, mantissa=2, bias=15, special=0x7C)
decode_e2m1 = _decoder(bits=4, mantissa=1, bias=1, special=0x8)


@njit(nogil=True, error_model="numpy", cache=True)
def unpack(packed, codes):
    """Two codes a byte, the first in the lower half: `packed` (uint8, n/2) → `codes` (uint8, n), which is returned."""
    for i in range(packed.size):
        codes[2 * i] = packed[i] & np.uint8(15)
        codes[2 * i + 1] = packed[i] >> np.uint8(4)
    return codes
