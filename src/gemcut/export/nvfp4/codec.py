"""NVFP4 numbers: E2M1 codes in blocks of 16 with an FP8 scale each, under one float32 scale for a whole module.

    w' = e2m1 · s / G       G = 2688 / A,  2688 = 448 · 6,  A = max |w| over every tensor that shares the scale
                            s = FP8 e4m3, one for 16 neighbours of a row; s · 6 / G covers the block's largest value

Codes 0…7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign. Rounding is to the nearest, ties to the even code; above 5
everything is 6. Two codes make a byte, the left one in the low nibble.
Source: compressed-tensors 0.20, nvfp4_pack_quantized; OCP Microscaling Formats 1.0, §5.3.3 (E2M1).

A tile is [R, F] as it is stored; its blocks are the rows of [N, 16], N = R · F/16, and nothing is transposed.
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


def magnitudes(tile: torch.Tensor) -> torch.Tensor:
    """|w| as whole numbers in the order of |w|: the bits without their sign, int16 or int32. NaN is above infinity.

    `.view(tile.dtype)` of them is |w|.
    """
    bits = tile.view(torch.int32 if tile.element_size() == 4 else torch.int16)
    return bits & torch.iinfo(bits.dtype).max


def round_into(out: torch.Tensor, y: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Non-negative y to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 in `out`; ties to the even code.

    The step between neighbours is half the power of two below y, and 0.5 below 1; above 6 it would go on to 8.
    `spare`: as large as y, overwritten.
    """
    torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=spare.view(torch.int32))
    spare.clamp_(min=1.0).mul_(_HALF_STEP)
    return torch.add(y, spare, out=out).sub_(spare).clamp_(max=LARGEST_CODE)


def fp8_of_largest(largest: torch.Tensor, scale: float) -> torch.Tensor:
    """The scale that puts a block's largest value at 6: e4m3(G · a / 6), as float32, for every a.

    A block of zeros gets 1; any other at least the least number above zero.
    """
    wanted = (largest * scale / LARGEST_CODE).clamp_(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.where(largest > 0, to_fp8(wanted), ZERO_BLOCK_SCALE)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """float32 in 0…448, rounded to e4m3 (ties to even), as float32."""
    return values.to(torch.float8_e4m3fn).to(torch.float32)


def encode(tile: torch.Tensor, scales: torch.Tensor, scale: float) -> Coded:
    """Codes of one tile under chosen block scales: round(w · G / s).

    Args:
        tile: [R, F].   scales: e4m3 numbers as float32 [R, F/16], none of them 0.   scale: G.
    """
    weights = tile.float().view(-1, GROUP)
    size = weights.abs()
    steps = scales.view(-1, 1)
    y, spare = (size * scale).div_(steps), torch.empty_like(size)
    round_into(y, y, spare)
    torch.mul(y, steps / scale, out=spare)
    spare.sub_(size)
    error, norm = _sum_of_squares(spare), _sum_of_squares(size)
    codes = _codes(y, spare)
    # Bit 3 where the weight is negative and its code not 0. A negative float32 has its sign in every bit above 28.
    signs = (weights.view(torch.int32) >> 28).to(torch.uint8).bitwise_and_(8)
    codes |= (codes + 7).bitwise_and_(signs)
    pairs = codes.view(torch.int16)  # the left code in the low byte
    packed = ((pairs >> 4) | pairs).to(torch.uint8)
    return Coded(packed.view(len(tile), -1), scales.to(torch.float8_e4m3fn), error, norm)


def _codes(rounded: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Codes 0…7 of exact E2M1 values y, uint8: the least of 2y, y + 2 and y/2 + 4. Overwrites both."""
    torch.add(rounded, 2, out=spare)
    torch.minimum(spare, rounded * 2, out=spare)
    return torch.minimum(spare, rounded.mul_(0.5).add_(4), out=spare).to(torch.uint8)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Σ x² of [N, 16], which it overwrites: sixteenths of the tile on top of each other in float32, then in float64 by
    numpy, whose order no number of threads moves."""
    return float(values.mul_(values).view(GROUP, -1).sum(0).double().cpu().numpy().sum())
