"""The FP8 scale of every block: from its largest value alone, or the one that loses least.

minmax         s = e4m3(G · a / 6): the largest value a of the block lands on 6
four_over_six  the better of that and e4m3(G · a / 4); Four Over Six, arXiv:2512.02010
sweep          the best of the e4m3 numbers around it, Σ (w' − w)² over the block; ScaleSweep, arXiv:2606.07618
weighted       the same with Σ m·(w' − w)², m = √E[a²] of the weight's input column

E[a²] itself would trust the few tokens of an expert too far. Scales above 6 / a clip, scales below it leave codes
unused: both can lose less, since the steps of E2M1 are uneven.

A magnitude has 15 bits in BF16, so what it loses under each of sixteen scales is looked up: a row of a table for every
magnitude near a block's largest, and one sum of sixteen rows for every block. Losses are whole numbers so small that a
float32 adds them without rounding: the choice depends on neither the order of sums nor the processor. Weights in F16
and F32 are rounded to BF16 for the choice, and only for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from gemcut.export.nvfp4.codec import (
    GROUP,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    fp8_of_largest,
    magnitudes,
    round_into,
    to_fp8,
)
from gemcut.nvfp4.choices import Method
from gemcut.types import F64

# Places from the e4m3 number of minmax, eight to an octave; of equal losses the one nearest to it is taken.
_STEPS = tuple(sorted(range(-8, 8), key=lambda step: (abs(step), -step)))
_LARGEST_BYTE = 0x7E  # 448
_SMALLEST_BYTE = 0x01
_DOWN, _UP = 6, 3.25  # octaves of magnitudes around a block's scale that some step tells apart from 0 and from 6
_MANTISSAS = 128  # of BF16: magnitudes in an octave
_ROWS = int((_DOWN + _UP) * _MANTISSAS)
_EXACT = 2**24 - 1  # whole numbers up to here have a float32
_CUT_OFF = 4.0  # squared scales; a magnitude that loses more loses the block
_WEIGHT = 4096  # sum of a block's weights
_HELD = 4  # groups at a time


def block_scales(tile: torch.Tensor, scale: float, method: Method, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Scales s of one tile, e4m3 numbers as float32 [R, F/16].

    Args:
        tile: finite weights of any float type [R, F].   scale: G.
        weights: float32 [F], see `column_weights`, for "weighted".
    """
    rows, columns = tile.shape
    bits = magnitudes(tile).view(-1, GROUP)
    largest = bits.amax(1).view(tile.dtype).float()
    first = fp8_of_largest(largest, scale)
    if method != "minmax":
        matter = weights.repeat(rows) if weights is not None and method == "weighted" else None
        if tile.dtype != torch.bfloat16:
            bits = magnitudes(tile.bfloat16()).view(-1, GROUP)
        place = _place(first)
        table = _table(scale, _EXACT // (GROUP if matter is None else _WEIGHT), str(tile.device))
        lost = table.losses(bits, place, matter)
        if method == "four_over_six":
            wider = to_fp8((largest * (scale / 4)).clamp_(SMALLEST_SCALE, LARGEST_SCALE))
            step = (_place(wider) - place).clamp_(min=0)  # below it only in a block of zeros
            column = torch.tensor(np.argsort(_STEPS), device=tile.device)[step - min(_STEPS)]
            step *= lost.gather(1, column[:, None])[:, 0] < lost[:, 0]
        else:
            order = torch.arange(len(_STEPS), dtype=torch.int32, device=tile.device)
            best = lost.mul_(len(_STEPS)).add_(order).amin(1) % len(_STEPS)
            step = torch.tensor(_STEPS, dtype=torch.int32, device=tile.device).index_select(0, best)
        first = _number(place + step)
    return first.view(rows, columns // GROUP)


def column_weights(mean_squares: F64) -> torch.Tensor:
    """√E[a²] of every input column [F] → whole numbers as float32 [F], at least 1, that sum to at most 4096 in a block.

    Only their ratios within a block matter. Blocks where nothing was ever seen weigh all their columns alike.

    Args:
        mean_squares: E[a²] [F].
    """
    blocks = np.sqrt(mean_squares).reshape(-1, GROUP)
    total = blocks.sum(1, keepdims=True)
    share = np.divide(blocks, total, out=np.full_like(blocks, 1 / GROUP), where=total > 0)
    return torch.from_numpy((1 + np.floor(share * (_WEIGHT - GROUP))).astype(np.float32).reshape(-1))


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """What magnitudes lose under one G.

    rows: float32 [K · rows, 16], whole numbers: K kinds of scales, magnitudes one BF16 step apart, scales in the order
    of `_STEPS`. A kind is all e4m3 numbers with one mantissa, which differ by octaves; near the ends of e4m3, where
    steps are cut short or no longer eight to an octave, each number is its own.
    first, low: int32 and int16 [127], of every e4m3 number: the first row of its kind, and its magnitude.
    """

    rows: torch.Tensor
    first: torch.Tensor
    low: torch.Tensor

    def losses(self, bits: torch.Tensor, place: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Σ (m ·) (w' − w)² of blocks under each step from their e4m3 number, int32 [N, 16], in a unit of each block's.

        Args:
            bits: of |w| in BF16, int16 [N, 16].   place: int32 [N].   weights: m, float32 [N · 16].
        """
        at = bits.sub(self.low.index_select(0, place)[:, None]).clamp_(min=0, max=_ROWS - 1).int()
        at += self.first.index_select(0, place)[:, None]
        starts = torch.arange(0, at.numel(), GROUP, dtype=torch.int32, device=at.device)
        return torch.embedding_bag(self.rows, at.view(-1), starts, False, 0, False, weights)[0].int()


@lru_cache(maxsize=_HELD)
def _table(scale: float, levels: int, device: str) -> _Table:
    """Table under G = `scale`; no loss is above `levels`."""
    numbers = torch.arange(_LARGEST_BYTE + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    low = (numbers * 2.0**-_DOWN / scale).view(torch.int32) >> 16
    inside = range(8 - min(_STEPS), _LARGEST_BYTE + 1 - max(_STEPS))
    own = [place for place in range(1, _LARGEST_BYTE + 1) if place not in inside]
    kinds = torch.tensor([*range(0x40, 0x48), *own])
    kind = torch.arange(len(numbers)) % 8
    kind[own] = torch.arange(8, len(kinds))
    reach = torch.tensor(_STEPS)
    scales = _number(kinds[:, None] + reach)[:, None]  # [K, 1, 16]
    held = ((low[kinds][:, None] + torch.arange(_ROWS, dtype=torch.int32)) << 16).view(
        torch.float32
    ) * scale  # [K, rows]
    y = held[:, :, None] / scales
    lost = round_into(torch.empty_like(y), y, torch.empty_like(y)).sub_(y)
    unit = (levels / _CUT_OFF) ** 0.5
    lost.mul_(scales / numbers[kinds][:, None, None] * unit).square_().round_().clamp_(max=levels)
    return _Table(
        lost.view(-1, len(_STEPS)).to(device),
        (kind * _ROWS).int().to(device),
        low.to(torch.int16).to(device),
    )


def _place(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes of positive e4m3 numbers, int32: they are in the order of the numbers."""
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8).int()


def _number(place: torch.Tensor) -> torch.Tensor:
    """The e4m3 numbers of these bytes, or the nearest there are, as float32."""
    return place.clamp(_SMALLEST_BYTE, _LARGEST_BYTE).to(torch.uint8).view(torch.float8_e4m3fn).float()
