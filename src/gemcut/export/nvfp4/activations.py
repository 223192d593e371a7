"""What statistics say about the inputs of each group of linears: their largest value, and what each column weighs.

    G_x = 2688 / A_x        A_x  max        max |a| over all tokens and columns
                                 headroom   max(that, 16384 · b₁); b₁ is the 1st percentile over blocks of 16 columns of
                                            the block's largest √E[a²]: louder inputs than were seen still fit, and the
                                            quiet blocks' FP8 scales stay above 2^-6, where they lose no precision

An expert that saw too few tokens borrows: the largest A_x of its layer's other experts, and their mean E[a²]. Who
borrowed is recorded; when too many of a layer do, nothing is exported.
Source: `headroom` follows modelopt 0.47, nvfp4_act_headroom, with column statistics in place of block maxima.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gemcut.checkpoint import Checkpoint
from gemcut.errors import CheckpointError, QualityError
from gemcut.export.imatrix.starved import STARVED_SHARE, starved_units
from gemcut.families.linears import LinearGroup
from gemcut.nvfp4.choices import MAX_BORROWED, ActivationRule
from gemcut.records import StatisticsIndex, load_index_of
from gemcut.records.linears import LinearSums, load_linears
from gemcut.types import F64

_GROUP = 16
_HEADROOM = 16384.0  # 448 / 16384 is a little above 2^-6, the least normal e4m3 number
_QUIET = 0.01
Key: TypeAlias = tuple[str, int]
"""(input, unit) of a `LinearGroup`."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupInput:
    """Of one group.   largest: A_x.   mean_squares: E[a²] of every column [F].   tokens: rows that were seen.

    borrowed: both are the other experts', since this one saw too few tokens.
    """

    largest: float
    mean_squares: F64
    tokens: int
    borrowed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """The statistics of one checkpoint, read a layer at a time."""

    folder: Path
    index: StatisticsIndex
    rule: ActivationRule
    max_borrowed: float

    def layer(self, layer: int, groups: Sequence[LinearGroup]) -> Mapping[Key, GroupInput]:
        """What enters each group of one layer.

        Raises:
            QualityError: a linear saw nothing, or too many of the layer's experts saw too little.
            CheckpointError: the sums do not have the shapes of the weights.
        """
        sums = load_linears(self.folder, self.index, layer)
        out: dict[Key, GroupInput] = {}
        for name in dict.fromkeys(group.input for group in groups):
            mine = [group for group in groups if group.input == name]
            found = sums.get(name)
            if found is None:
                raise CheckpointError("the statistics lack the input of a linear", where=f"layer {layer}, {name}")
            columns = mine[0].matrices[0].columns
            if found.columns != columns or found.a2.shape[1] <= max(group.unit for group in mine):
                raise CheckpointError(
                    "the statistics are of another model: a linear has another shape",
                    where=f"layer {layer}, {name}",
                    got=f"{found.a2.shape[1]} × {found.columns}",
                    wanted=f"{len(mine)} × {columns}",
                )
            inputs = self._inputs(found, f"layer {layer}, {name}")
            out.update({(name, group.unit): inputs[group.unit] for group in mine})
        return out

    def _inputs(self, sums: LinearSums, where: str) -> list[GroupInput]:
        """One for every unit.   n [U], a2 [U, F], amax [U, F] of both halves together."""
        n, a2 = sums.n.sum(0), sums.a2.sum(0)
        own = [_largest(self.rule, sums.amax[u].astype(np.float64), a2[u], float(n[u])) for u in range(len(n))]
        poor = {u for u in range(len(n)) if n[u] == 0 or own[u] == 0} | set(starved_units(n))
        rich = [u for u in range(len(n)) if u not in poor]
        if not rich or len(poor) > self.max_borrowed * len(n):
            raise QualityError(
                "the statistics cover too little of the model: no scale of its activations can be told",
                where=where,
                got=f"{len(poor)} of {len(n)} saw nothing, or below {STARVED_SHARE:.0%} of the mean of {n.mean():.0f} "
                "tokens",
                wanted=f"at most {self.max_borrowed:.0%}",
                hint="observe more, or broader, text: gemcut observe, gemcut merge",
            )
        largest = max(own[u] for u in rich)
        mean = a2[rich].sum(0) / n[rich].sum()
        return [
            GroupInput(largest, mean, int(n[u]), True)
            if u in poor
            else GroupInput(own[u], a2[u] / n[u], int(n[u]), False)
            for u in range(len(n))
        ]


def observed(
    folder: Path, checkpoint: Checkpoint, rule: ActivationRule = "max", *, max_borrowed: float = MAX_BORROWED
) -> Observed:
    """Open the statistics of this very checkpoint.

    Args:
        max_borrowed: share of a layer's experts that may borrow.
    Raises:
        CheckpointError: they are of another checkpoint.
    """
    return Observed(folder, load_index_of(folder, checkpoint.fingerprint), rule, max_borrowed)


def gate(found: Observed, groups: Iterable[LinearGroup]) -> Mapping[int, tuple[Key, ...]]:
    """Read every layer before anything is written; returns who borrows, by layer. Raises as `Observed.layer` does."""
    by_layer: dict[int, list[LinearGroup]] = {}
    for group in groups:
        by_layer.setdefault(group.layer, []).append(group)
    borrowers = {
        layer: tuple(key for key, one in found.layer(layer, mine).items() if one.borrowed)
        for layer, mine in sorted(by_layer.items())
    }
    return {layer: keys for layer, keys in borrowers.items() if keys}


def _largest(rule: ActivationRule, largest: F64, squares: F64, tokens: float) -> float:
    """A_x from the largest |a| of every column [F] and Σ a² [F]; 0 where nothing was seen."""
    seen = float(largest.max(initial=0.0))
    if rule == "max" or not tokens or largest.size % _GROUP:
        return seen
    blocks = np.sqrt(squares / tokens).reshape(-1, _GROUP).max(1)
    return max(seen, _HEADROOM * float(np.quantile(blocks, _QUIET))) if seen else 0.0
