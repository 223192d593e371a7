"""NVFP4 numbers: E2M1 codes in blocks of 16 with an FP8 scale each, under one float32 scale for a whole module.

    w' = e2m1 · s / G       G = 2688 / A,  2688 = 448 · 6,  A = max |w| over every tensor that shares the scale
                            s = FP8 e4m3, one for 16 neighbours of a row; s · 6 / G covers the block's largest value

Codes 0…7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign. Rounding is to the nearest, ties to the even code; above 5
everything is 6. Two codes make a byte, the left one in the low nibble.
Source: compressed-tensors 0.20, nvfp4_pack_quantized; OCP Microscaling Formats 1.0, §5.3.3 (E2M1).

Tiles live as [16, R, B]: element of the block, row, block of the row. All work runs along the long axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gemcut.errors import CheckpointError

GROUP = 16
LARGEST_CODE = 6.0
LARGEST_SCALE = 448.0
SMALLEST_SCALE = 2.0**-9  # the least e4m3 number above zero: a block that holds anything never has a scale of zero
ZERO_BLOCK_SCALE = 1.0  # of a block of zeros, whose codes are zero whatever it is
RANGE = LARGEST_CODE * LARGEST_SCALE
_SMALLEST_MAX = 2.0**-100  # below this, G would leave float32
_HALF_STEP = 0.75 * 2**23  # x + 1.5·2²³·step − 1.5·2²³·step rounds x to a multiple of step, ties to even
_EXPONENT = 0x7F800000  # bits of a float32 that make it the power of two below


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """One tile in NVFP4.

    packed: uint8 [R, F/2].   scales: float8_e4m3fn [R, F/16].
    squared_error, squared_norm: Σ (w' − w)² and Σ w², float64 sums of float32 rows, in units of w².
    """

    packed: torch.Tensor
    scales: torch.Tensor
    squared_error: float
    squared_norm: float


def global_scale(largest: float) -> float:
    """G = 2688 / A as a float32 whose reciprocal's reciprocal it is, so that G and 1/G say the same in either layout.

    Args:
        largest: A, max |w| over all tensors that share the scale; 0 counts as 1.
    Raises:
        CheckpointError: A is NaN or infinite.
    """
    if not math.isfinite(largest):
        raise CheckpointError("a weight is NaN or infinite", got=largest)
    wanted = torch.tensor(RANGE / max(largest, _SMALLEST_MAX) if largest > 0 else RANGE, dtype=torch.float32)
    return float(1.0 / (1.0 / wanted))


def to_blocks(tile: torch.Tensor) -> torch.Tensor:
    """[R, F] of any float type → float32 [16, R, B], contiguous."""
    rows, columns = tile.shape
    out = torch.empty((GROUP, rows, columns // GROUP), dtype=torch.float32, device=tile.device)
    return out.copy_(tile.view(rows, columns // GROUP, GROUP).permute(2, 0, 1))


def round_into(out: torch.Tensor, y: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Non-negative y to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 in `out`; ties to the even code.

    The step between neighbours is half the power of two below y, and 0.5 below 1; above 6 it would go on to 8.
    `spare`: as large as y, overwritten.
    """
    torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=spare.view(torch.int32))
    spare.clamp_(min=1.0).mul_(_HALF_STEP)
    return torch.add(y, spare, out=out).sub_(spare).clamp_(max=LARGEST_CODE)


def fp8_of_largest(largest: torch.Tensor, scale: float) -> torch.Tensor:
    """The scale that puts a block's largest value at 6: e4m3(G · a / 6), as float32 [R, B].

    A block of zeros gets 1; any other at least the least number above zero.
    """
    wanted = (largest * scale / LARGEST_CODE).clamp_(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.where(largest > 0, to_fp8(wanted), ZERO_BLOCK_SCALE)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """float32 in 0…448, rounded to e4m3 (ties to even), as float32."""
    return values.to(torch.float8_e4m3fn).to(torch.float32)


def encode(blocks: torch.Tensor, scales: torch.Tensor, scale: float) -> Coded:
    """Codes of one tile under chosen block scales: round(w · G / s).

    Args:
        blocks: float32 [16, R, B].   scales: e4m3 numbers as float32 [R, B], none of them 0.   scale: G.
    """
    size = blocks.abs()
    y = (size * scale).div_(scales)
    spare = torch.empty_like(y)
    round_into(y, y, spare)
    torch.mul(y, scales / scale, out=spare)
    spare.sub_(size)
    error, norm = _sum_of_squares(spare), _sum_of_squares(size)
    codes = _code_of(y)
    codes |= ((blocks < 0) & (codes > 0)).to(torch.uint8) << 3
    pairs = codes[0::2] | (codes[1::2] << 4)  # [8, R, B]
    _, rows, count = blocks.shape
    packed = pairs.permute(1, 2, 0).reshape(rows, count * GROUP // 2)
    return Coded(packed, scales.to(torch.float8_e4m3fn), error, norm)


def _code_of(rounded: torch.Tensor) -> torch.Tensor:
    """Codes 0…7 of exact E2M1 values: 2y below 2, then 4, 5, 6, 7 for 2, 3, 4, 6."""
    twice = (rounded * 2).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    return twice - (twice > 4).to(torch.uint8) - (twice > 6).to(torch.uint8) - 3 * (twice > 8).to(torch.uint8)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Over each block in float32, then in float64 by numpy, whose order no number of threads moves."""
    return float(values.mul_(values).sum(0).double().cpu().numpy().sum())
