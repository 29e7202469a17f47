"""The inner loops of 4-bit encoding, compiled by numba; `encode.py` says what they compute.

bitsandbytes' CPU path scales a block of 64 weights by `s = 1 / max(absmax, 1e-38)` in float32 and counts the 15
midpoints of the sorted code book that lie below the rounded product; the count says which code it is. A product grows
with its weight, so for bfloat16 each midpoint has one largest bfloat16 that does not exceed it; and it depends on
nothing but the block's absmax, of which there are only 32,768. Those thresholds are found once for each of them,
exactly, by trying the candidates; weights are then compared with them as 16-bit integers, 16 or 32 at a time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64
_GROUP = 16
"""Blocks whose codes are packed together: a loop of unknown length is what the compiler makes vector code of."""
_MAGNITUDE = np.int16(0x7FFF)
_INFINITY = np.int16(0x7F80)


@njit(inline="always")
def _key(bits):
    """bfloat16 bits to integers in the order of the values (int32, sign-extended); its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFF))


@njit(inline="always")
def _above(key, scale, bound):
    """1 if the product of the bfloat16 of this key and the scale, rounded to float32, exceeds the bound."""
    value = np.int32(_key(key) << np.int32(16)).view(np.float32)
    return np.int32(np.float32(value * scale) > bound)


@njit(nogil=True, error_model="numpy", cache=True)
def find_thresholds(bounds, thresholds):
    """Fill `thresholds` (int16, 32768 × 16): for each absmax, as bfloat16 bits, the largest key below each midpoint.

    `bounds` (float32, 16) are the midpoints and one number above 1, whose thresholds are not used.
    """
    for top in range(thresholds.shape[0]):
        largest = np.int32(np.int32(top) << 16).view(np.float32)
        scale = np.float32(1.0) / max(largest, np.float32(1e-38))
        for k in range(16):
            if bounds[k] == 0:
                # a product may vanish: how far from zero that ends depends on the scale
                low, high = np.int32(0), np.int32(0x7F7F)
                while low < high:
                    middle = (low + high + np.int32(1)) >> np.int32(1)
                    if _above(middle, scale, bounds[k]):
                        high = middle - np.int32(1)
                    else:
                        low = middle
                thresholds[top, k] = low
                continue
            # dividing and cutting off come within a step of the threshold, either side: the tests try every absmax
            key = _key(np.float32(bounds[k] / scale).view(np.int32) >> np.int32(16)) + np.int32(1)
            key -= _above(key, scale, bounds[k])
            key -= _above(key, scale, bounds[k])
            thresholds[top, k] = key


@njit(inline="always")
def _pack(wide, codes):
    """Two codes a byte, the first in the high half: `wide` (int16) → `codes` (uint8, half as many)."""
    pairs = wide.view(np.uint32)  # little-endian: the first is the lower half
    for i in range(codes.size):
        codes[i] = np.uint8((pairs[i] << np.uint32(4)) | (pairs[i] >> np.uint32(16)))


@njit(nogil=True, error_model="numpy", cache=True)
def encode_bfloat16(bits, codes, absmax, thresholds, steps):
    """Encode whole blocks of bfloat16.

    `bits` (int16, n) → `codes` (uint8, n/2), `absmax` (float32, n/64); `thresholds` are those of `find_thresholds`.
    `steps` (int16, 16) are how much each midpoint that lies below adds to the code, and the lowest value's code.
    Returns False if there is a NaN or infinity.
    """
    keys = np.empty(BLOCK, np.int16)
    wide = np.empty(_GROUP * BLOCK, np.int16)
    finite = True
    blocks = bits.size // BLOCK
    s0, s1, s2, s3, s4, s5, s6, s7 = steps[0], steps[1], steps[2], steps[3], steps[4], steps[5], steps[6], steps[7]
    s8, s9, s10, s11, s12, s13, s14 = steps[8], steps[9], steps[10], steps[11], steps[12], steps[13], steps[14]
    lowest = steps[15]
    for first in range(0, blocks, _GROUP):
        last = min(first + _GROUP, blocks)
        for block in range(first, last):
            weights = bits[block * BLOCK : block * BLOCK + BLOCK]
            top = np.int16(0)
            for i in range(BLOCK):
                top = max(top, np.int16(weights[i] & _MAGNITUDE))
                keys[i] = weights[i] ^ ((weights[i] >> np.int16(15)) & _MAGNITUDE)
            finite &= top < _INFINITY
            absmax[block] = np.int32(np.int32(top) << 16).view(np.float32)
            t = thresholds[top]
            # scalars and one expression: only so is the loop over the weights turned into vector instructions
            t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
            t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
            coded = wide[(block - first) * BLOCK : (block - first) * BLOCK + BLOCK]
            for i in range(BLOCK):
                x = keys[i]
                coded[i] = np.int16(
                    lowest
                    + np.int16(x > t0) * s0 + np.int16(x > t1) * s1 + np.int16(x > t2) * s2 + np.int16(x > t3) * s3
                    + np.int16(x > t4) * s4 + np.int16(x > t5) * s5 + np.int16(x > t6) * s6 + np.int16(x > t7) * s7
                    + np.int16(x > t8) * s8 + np.int16(x > t9) * s9 + np.int16(x > t10) * s10 + np.int16(x > t11) * s11
                    + np.int16(x > t12) * s12 + np.int16(x > t13) * s13 + np.int16(x > t14) * s14
                )  # fmt: skip
        _pack(wide, codes[first * (BLOCK // 2) : last * (BLOCK // 2)])
    return finite


@njit(nogil=True, error_model="numpy", cache=True)
def encode_float32(weights, codes, absmax, bounds, steps):
    """Encode whole blocks of float32 (float16 is widened first), by `bounds`; otherwise as `encode_bfloat16`."""
    wide = np.empty(_GROUP * BLOCK, np.int16)
    finite = True
    blocks = weights.size // BLOCK
    for first in range(0, blocks, _GROUP):
        last = min(first + _GROUP, blocks)
        for block in range(first, last):
            part = weights[block * BLOCK : block * BLOCK + BLOCK]
            largest = np.float32(0.0)
            for i in range(BLOCK):
                finite &= np.isfinite(part[i])
                largest = max(largest, np.abs(part[i]))
            absmax[block] = largest
            scale = np.float32(1.0) / max(largest, np.float32(1e-38))
            coded = wide[(block - first) * BLOCK : (block - first) * BLOCK + BLOCK]
            for i in range(BLOCK):
                x = np.float32(part[i] * scale)
                code = steps[15]
                for k in range(15):
                    code += np.int16(x > bounds[k]) * steps[k]
                coded[i] = code
        _pack(wide, codes[first * (BLOCK // 2) : last * (BLOCK // 2)])
    return finite
