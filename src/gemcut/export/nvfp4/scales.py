"""The FP8 scale of every block: from its largest value alone, or the one that loses least.

minmax         s = e4m3(G · a / 6): the largest value a of the block lands on 6
four_over_six  the better of that and e4m3(G · a / 4); Four Over Six, arXiv:2512.02010
sweep          the best of the e4m3 numbers around it, Σ (w' − w)² over the block; ScaleSweep, arXiv:2606.07618
weighted       the same with Σ m·(w' − w)², m = E[a²] of the weight's input column

Scales above 6 / a clip, scales below it leave codes unused: both can lose less, since the steps of E2M1 are uneven.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gemcut.export.nvfp4.codec import GROUP, LARGEST_SCALE, SMALLEST_SCALE, fp8_of_largest, round_into, to_fp8
from gemcut.nvfp4.choices import Method as Method
from gemcut.types import F64

# Places from the e4m3 number of minmax, eight to an octave; nearest first, so that a tie stays near.
SWEPT = (1, -1, 2, 3, 4, 5, 6, 7, -2)
_LARGEST_BYTE = 0x7E  # 448
_SMALLEST_BYTE = 0x01


def block_scales(
    blocks: torch.Tensor, scale: float, method: Method, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales s of one tile, e4m3 numbers as float32 [R, B].

    Args:
        blocks: float32 [16, R, B].   scale: G.   weights: float32 [16, 1, B], E[a²] per column, for "weighted".
    """
    size = blocks.abs()
    largest = size.amax(0)
    first = fp8_of_largest(largest, scale)
    if method == "minmax":
        return first
    if method == "four_over_six":
        wider = to_fp8((largest * (scale / 4)).clamp_(SMALLEST_SCALE, LARGEST_SCALE))
        return _best(size, scale, first, [wider], None)
    return _best(size, scale, first, _neighbours(first, SWEPT), weights if method == "weighted" else None)


def _neighbours(first: torch.Tensor, steps: Sequence[int]) -> list[torch.Tensor]:
    """The e4m3 numbers so many places further; positive e4m3 numbers are in the order of their bytes."""
    place = first.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    moved = [(place + step).clamp_(_SMALLEST_BYTE, _LARGEST_BYTE).to(torch.uint8) for step in steps]
    return [one.view(torch.float8_e4m3fn).to(torch.float32) for one in moved]


def _best(
    size: torch.Tensor, scale: float, first: torch.Tensor, others: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    """Of `first` and `others` the scale with the least error in each block, the earliest where several are equal."""
    trial = _Trial(size * scale, weights)
    best, least = first.clone(), trial.error(first)
    for other in others:
        error = trial.error(other)
        better = error < least
        torch.where(better, other, best, out=best)
        torch.where(better, error, least, out=least)
    return best


class _Trial:
    """Errors of one tile under trial scales; its buffers are used again for each."""

    def __init__(self, scaled: torch.Tensor, weights: torch.Tensor | None) -> None:
        """scaled: G·|w|, float32 [16, R, B]."""
        self._scaled, self._weights = scaled, weights
        self._y, self._spare, self._change = (torch.empty_like(scaled) for _ in range(3))

    def error(self, scales: torch.Tensor) -> torch.Tensor:
        """Σ m·(G·w' − G·w)² of every block under these scales, float32 [R, B]."""
        torch.mul(self._scaled, 1.0 / scales, out=self._y)
        change = round_into(self._change, self._y, self._spare).sub_(self._y)
        change.mul_(change)
        if self._weights is not None:
            change.mul_(self._weights)
        return change.sum(0).mul_(scales * scales)


def column_weights(mean_squares: F64) -> torch.Tensor:
    """E[a²] of every input column [F] → float32 [16, 1, F/16], with mean 1; all ones where nothing was ever seen."""
    mean = float(mean_squares.mean())
    even = mean_squares / mean if mean > 0 else np.ones_like(mean_squares)
    return torch.from_numpy(np.ascontiguousarray(even.astype(np.float32).reshape(-1, GROUP).T[:, None]))
