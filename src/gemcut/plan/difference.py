"""Two plans side by side: how many drops they share, and how many chance would share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemcut.errors import UsageError
from gemcut.types import Plan


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Units dropped by one plan only, and by both. A layer that a plan does not name drops nothing there."""

    layer: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    both: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """overlap: 2·|A ∩ B| / (|A| + |B|) over all layers; for equal budgets the share of drops in common.

    jaccard: |A ∩ B| / |A ∪ B|. Both are 1 when neither plan drops anything.
    expected, expected_sd: mean and standard deviation of `overlap` if B had drawn its units of each layer at random.
    drops_a, drops_b: the counts that the shares rest on.
    """

    layers: tuple[LayerDifference, ...]
    same_model: bool
    drops_a: int
    drops_b: int
    shared: int
    overlap: float
    jaccard: float
    expected: float
    expected_sd: float

    @property
    def same(self) -> bool:
        return self.shared == self.drops_a == self.drops_b


def diff_plans(a: Plan, b: Plan) -> PlanDiff:
    """Compare what two plans drop.

        E|A ∩ B| = Σ_l a_l·b_l/U     Var = Σ_l a_l·(b_l/U)·(1 − b_l/U)·(U − a_l)/(U − 1)      (hypergeometric)

    Raises:
        UsageError: the plans are about different kinds of units, or different numbers of them.
    """
    if (a.kind, a.units) != (b.kind, b.units):
        raise UsageError(
            "the plans are not about the same units", got=f"{b.units} {b.kind}", wanted=f"{a.units} {a.kind}"
        )
    layers = []
    expected = variance = 0.0
    for layer in sorted({*a.layers, *b.layers}):
        in_a = set(a.layers[layer].drop) if layer in a.layers else set()
        in_b = set(b.layers[layer].drop) if layer in b.layers else set()
        layers.append(
            LayerDifference(
                layer=layer,
                only_a=tuple(sorted(in_a - in_b)),
                only_b=tuple(sorted(in_b - in_a)),
                both=tuple(sorted(in_a & in_b)),
            )
        )
        share = len(in_b) / a.units
        expected += len(in_a) * share
        if a.units > 1:
            variance += len(in_a) * share * (1 - share) * (a.units - len(in_a)) / (a.units - 1)
    drops_a = sum(len(one.only_a) + len(one.both) for one in layers)
    drops_b = sum(len(one.only_b) + len(one.both) for one in layers)
    shared = sum(len(one.both) for one in layers)
    half = (drops_a + drops_b) / 2
    union = drops_a + drops_b - shared
    return PlanDiff(
        layers=tuple(layers),
        same_model=a.model_fingerprint == b.model_fingerprint,
        drops_a=drops_a,
        drops_b=drops_b,
        shared=shared,
        overlap=shared / half if half else 1.0,
        jaccard=shared / union if union else 1.0,
        expected=expected / half if half else 1.0,
        expected_sd=math.sqrt(variance) / half if half else 0.0,
    )
