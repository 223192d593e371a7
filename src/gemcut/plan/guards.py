"""What no criterion may drop, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import QualityError, UsageError
from gemcut.types import F64, Json, Scores, Statistics


@dataclass(frozen=True, slots=True)
class Guards:
    """Units that stay whatever their score.

    super_factor: an expert whose largest |output component| is more than this many times its layer's median, and
        among the top `super_share` of all experts of the model, stays. None is off.
        Source: "Super Experts", arXiv:2507.23279: a handful of rare experts with huge outputs carry the attention
        sinks; dropping 3 of 6,144 ruined Qwen3-30B. They are rarely routed, so frequency drops them first.
    class_floor: every class keeps its own best N units of each layer. 0 is off.
    """

    super_factor: float | None = 50.0
    super_share: float = 0.005
    class_floor: int = 0

    def __post_init__(self) -> None:
        if self.super_factor is not None and not (math.isfinite(self.super_factor) and self.super_factor > 1):
            raise UsageError("guards.super_factor is out of bounds", got=self.super_factor, wanted="more than 1")
        if not 0 < self.super_share <= 1:
            raise UsageError("guards.super_share is out of bounds", got=self.super_share, wanted="above 0, at most 1")
        if self.class_floor < 0:
            raise UsageError("guards.class_floor is out of bounds", got=self.class_floor, wanted="0 or more")

    def to_json(self) -> dict[str, Json]:
        return {
            "super_factor": self.super_factor,
            "super_share": self.super_share,
            "class_floor": self.class_floor,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Guarded:
    """Units that stay: bool [L, U], a reason for each, and what was given up to make them fit."""

    kept: NDArray[np.bool_]
    reasons: Mapping[tuple[int, int], str]  # (row, unit) → one line
    notes: tuple[str, ...]


def largest_output(stats: Statistics) -> F64:
    """max |component of f| over classes, float64 [L, E]."""
    largest: F64 = stats.by_class["f_max"].max(axis=0)
    return largest


def median_output(stats: Statistics) -> F64:
    """Each layer's median of `largest_output` over experts that were routed at all, float64 [L]; 0 for none."""
    largest = largest_output(stats)
    routed = stats.by_class["n"].sum(axis=0) > 0
    return np.array([np.median(a[r]) if r.any() else 0.0 for a, r in zip(largest, routed, strict=True)], np.float64)


def super_experts(stats: Statistics, factor: float, share: float) -> NDArray[np.bool_]:
    """f_max[l, e] > factor · median_e f_max[l, ·], and among the top share·L·E of the model; bool [L, E]."""
    largest = largest_output(stats)
    count = max(1, math.floor(share * largest.size))
    threshold = np.sort(largest, axis=None)[-count]
    found: NDArray[np.bool_] = (largest > factor * median_output(stats)[:, None]) & (largest >= threshold)
    return found & (largest > 0)


def class_best(scores: Scores, stats: Statistics | None, best: int) -> NDArray[np.bool_]:
    """Each class's own `best` units of every layer, bool [C, L, U].

    A class ranks by the criterion's own view of it; by Σ g·‖f‖ where the criterion has none. Units without any score
    for the class are not protected.
    """
    per_class = scores.per_class
    if per_class is None:
        if stats is None:
            raise UsageError(
                "guards.class_floor needs the statistics", hint="pass the statistics that the scores came from"
            )
        per_class = stats.by_class["gf"]
    order = np.argsort(-per_class, axis=2, kind="stable")[:, :, :best]
    top = np.zeros(per_class.shape, np.bool_)
    np.put_along_axis(top, order, True, axis=2)
    found: NDArray[np.bool_] = top & (per_class > 0)
    return found


def apply(guards: Guards, scores: Scores, keep: int, stats: Statistics | None) -> Guarded:
    """All protections of a plan that keeps `keep` units per layer.

    Super experts and class floors are never released. The criterion's own floors are: where everything together is
    more than `keep`, its lowest scores go first, and a note says how many.

    Raises:
        QualityError: more super experts in a layer than units to keep.
        UsageError: class floors that do not fit, with the largest floor that does.
    """
    kept = np.zeros(scores.values.shape, np.bool_)
    reasons: dict[tuple[int, int], str] = {}
    if guards.super_factor is not None and stats is not None and scores.kind == "experts":
        _guard_super(guards, guards.super_factor, scores, stats, keep, kept, reasons)
    if guards.class_floor:
        _guard_classes(guards.class_floor, scores, stats, keep, kept, reasons)
    notes = _guard_own(scores, keep, kept, reasons)
    return Guarded(kept=kept, reasons=reasons, notes=notes)


def _guard_super(
    guards: Guards,
    factor: float,
    scores: Scores,
    stats: Statistics,
    keep: int,
    kept: NDArray[np.bool_],
    reasons: dict[tuple[int, int], str],
) -> None:
    found = super_experts(stats, factor, guards.super_share)
    largest, median = largest_output(stats), median_output(stats)
    for row, unit in np.argwhere(found):
        ratio = largest[row, unit] / median[row] if median[row] else math.inf
        reasons[int(row), int(unit)] = (
            f"super expert: largest output {largest[row, unit]:.4g} is {ratio:.0f} times its layer's median"
        )
    kept |= found
    crowded = np.flatnonzero(found.sum(axis=1) > keep)
    if len(crowded):
        row = int(crowded[0])
        raise QualityError(
            "more super experts than units to keep",
            where=f"layer {scores.layers[row]}",
            got=f"{int(found[row].sum())} super experts",
            wanted=f"at most keep = {keep}",
            hint="raise keep or guards.super_factor",
        )


def _guard_classes(
    floor: int,
    scores: Scores,
    stats: Statistics | None,
    keep: int,
    kept: NDArray[np.bool_],
    reasons: dict[tuple[int, int], str],
) -> None:
    best = class_best(scores, stats, floor)
    names = scores.classes or (stats.meta.classes if stats is not None else ())
    together = best.any(axis=0) | kept
    crowded = np.flatnonzero(together.sum(axis=1) > keep)
    if len(crowded):
        row = int(crowded[0])
        fits = max(
            m for m in range(floor) if m == 0 or ((class_best(scores, stats, m).any(0) | kept).sum(1) <= keep).all()
        )
        raise UsageError(
            "the class floors protect more units than the plan keeps",
            where=f"layer {scores.layers[row]}",
            got=f"{int(together[row].sum())} units protected for {len(names)} classes at class_floor {floor}",
            wanted=f"at most keep = {keep}",
            hint=f"guards.class_floor={fits} fits, or keep more",
        )
    for c, row, unit in np.argwhere(best):
        key = (int(row), int(unit))
        before = reasons.get(key)
        text = f"among the best {floor} of class {names[c]}"
        if before is None:
            reasons[key] = text
        elif before.startswith("among the best"):
            reasons[key] = f"{before}, {names[c]}"
    kept |= together


def _guard_own(
    scores: Scores, keep: int, kept: NDArray[np.bool_], reasons: dict[tuple[int, int], str]
) -> tuple[str, ...]:
    if scores.protected is None:
        return ()
    notes = []
    for row, layer in enumerate(scores.layers):
        wanted = scores.protected[row] & ~kept[row]
        room = keep - int(kept[row].sum())
        order = [u for u in np.argsort(-scores.values[row], kind="stable") if wanted[u]]
        for unit in order[:room]:
            kept[row, unit] = True
            reasons[row, int(unit)] = scores.why or f"protected by {scores.criterion}"
        if len(order) > room:
            notes.append(f"layer {layer}: {len(order) - room} protected units released, lowest scores first")
    return tuple(notes)
