"""NVFP4 read back, by tables, with nothing of the encoder: what a loader makes of the bytes. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemcut.types import F32

U8 = NDArray[np.uint8]
# value of a nibble: sign, two bits of exponent, one of mantissa
E2M1: F32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3: F32 = np.array([_e4m3(byte) for byte in range(256)], np.float32)  # e4m3fn: no infinities, 0x7F is NaN
_PAIRS: F32 = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=1)  # [256, 2]: low nibble, high nibble


def dequantise(packed: U8, scales: U8, scale: float) -> F32:
    """w' = e2m1 · (s / G), in float32, in the order of operations that compressed-tensors has.

    Args:
        packed: [R, F/2], two codes a byte, the left one low.   scales: e4m3 bytes [R, F/16].   scale: G.
    Returns:
        float32 [R, F]. NaN where a scale is.
    """
    rows, half = packed.shape
    steps = E4M3[scales] / np.float32(scale)
    values = _PAIRS[packed].reshape(rows, scales.shape[1], -1)
    return (values * steps[:, :, None]).reshape(rows, 2 * half)
