"""class_rank: weighted ranks over classes with a breadth bonus and a floor per layer ("C6", the coder map)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import UsageError
from gemcut.score.criterion import (
    Checked,
    Choice,
    ClassWeights,
    Criterion,
    Ranking,
    Real,
    Whole,
    class_weights,
    real,
    text,
    whole,
)
from gemcut.score.sums import BASES, Sums, check_class_weights, rank01
from gemcut.types import F64, I64


def rank(sums: Sums, params: Checked) -> Ranking:
    """Weighted class ranks, a bonus for breadth, and the strongest experts of every layer protected.

        r[c, l, e] = rank01_e b[c, l, e]                      0 lowest, 1 highest; equal scores share their rank
        S[l, e]    = max_c w[c]·r[c, l, e]  (combine=max)  or  Σ_c w[c]·r[c, l, e] / Σ_c w[c]  (combine=mean)
                     + breadth · mean_{c: w[c] > 0} r[c, l, e]
        v[l, e]    = max_{c: w[c] > 0} b[c, l, e] / tokens[c]                      the pooled "v4" score
        R[l]       = mean of the `keep` largest v[l, ·]                            the layer's relevance
        floor[l]   = round(keep · (floor_lo + (R[l] − min R)/(max R − min R) · (floor_hi − floor_lo)))
        protected  = the floor[l] experts with the largest v[l, ·]

    b [C, L, E] is the base `of`; S float64 [L, E]. `keep=0` means 98 of 128 of the experts. Where all R are equal
    the floor is floor_hi. floor_hi=0 turns the floors off.

    **combine=max makes weights act as tiers, not as proportions.** Ranks lie in [0, 1], so with weight 3 against 1
    every expert in the upper two thirds of the heavy class beats the best expert of a light class; light classes
    only choose among the lower third. Two maps with weights 0 and 1 for a class were found identical. combine=mean
    has no tiers.

    **Floors override the ranks.** With 0.765 to 0.969 of `keep` about four fifths of what stays is decided by v
    alone; plans count the units that only a floor keeps.

    Source: build_v5coder_c6.sh and generate_drop_map_v5.py of the 98-expert v5 coder prune (weights 1 1 3 1 1 2 2 2,
    breadth 0.5, floors 75 to 95 of 98). Different here, on purpose: ranks share ties (argsort put NaN and later
    experts first); the breadth mean leaves out classes of weight 0 (the tool counts them); b is one quantity instead
    of 2·norm + tokens; v is divided by the class's tokens, so that the class with the longest text does not decide
    every floor.

    Raises:
        UsageError: an unknown class in `weights`, floor_lo above floor_hi, or keep above the number of experts.
    """
    weights = check_class_weights(class_weights(params, "weights"), sums)
    used = weights > 0
    base = sums.base(text(params, "of"))
    ranks = rank01(base)  # [C, L, E]
    weighted = ranks * weights[:, None, None]
    if text(params, "combine") == "max":
        values = weighted[used].max(axis=0)
    else:
        values = weighted[used].sum(axis=0) / weights.sum()
    values = values + real(params, "breadth") * ranks[used].mean(axis=0)
    protected, why = None, ""
    if real(params, "floor_hi") > 0:
        pooled = (base[used] / sums.tokens()[used, None, None]).max(axis=0)
        counts = floors(pooled, _keep(sums, params), real(params, "floor_lo"), real(params, "floor_hi"))
        protected = _top(pooled, counts)
        why = f"floor: among its layer's {counts.min()} to {counts.max()} strongest by {text(params, 'of')} per token"
    return Ranking(values=values, protected=protected, why=why, per_class=weighted)


def _keep(sums: Sums, params: Checked) -> int:
    keep = whole(params, "keep") or max(1, round(sums.experts * 98 / 128))
    if keep > sums.experts:
        raise UsageError("class_rank.keep is too large", got=keep, wanted=f"at most {sums.experts} experts")
    return keep


def floors(pooled: F64, keep: int, low: float, high: float) -> I64:
    """How many experts of each layer are protected: [L, E] to int64 [L].

    Raises:
        UsageError: the lower floor is above the higher one.
    """
    if low > high:
        raise UsageError("floor_lo is above floor_hi", got=f"{low:g} and {high:g}", wanted="floor_lo ≤ floor_hi")
    relevance = np.sort(pooled, axis=1)[:, -keep:].mean(axis=1)  # [L]
    spread = relevance.max() - relevance.min()
    place = (relevance - relevance.min()) / spread if spread > 0 else np.ones_like(relevance)
    counts: I64 = np.round(keep * (low + place * (high - low))).astype(np.int64)
    return counts


def _top(pooled: F64, counts: I64) -> NDArray[np.bool_]:
    order = np.argsort(-pooled, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(pooled.shape[1])[None, :], axis=1)
    top: NDArray[np.bool_] = place < counts[:, None]
    return top


CRITERION = Criterion(
    name="class_rank",
    about="weighted class ranks, breadth bonus, and a floor per layer (the C6 map)",
    source="omnimergekit, build_v5coder_c6.sh",
    rank=rank,
    params={
        "of": Choice("gf", BASES),
        "weights": ClassWeights(),
        "combine": Choice("max", ("max", "mean")),
        "breadth": Real(0.5, 0.0, 10.0),
        "keep": Whole(0, 0),
        "floor_lo": Real(75 / 98, 0.0, 1.0),
        "floor_hi": Real(95 / 98, 0.0, 1.0),
    },
)
