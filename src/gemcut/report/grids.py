"""The numbers behind the figures that are grids over layers and units. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemcut.report.data import ReportData
from gemcut.types import F64, I64, Statistics

_ROUNDS_AT_ONCE = 25
NEAR_TIE = (0.05, 0.95)  # a keep probability strictly between them means the corpus does not decide


@dataclass(frozen=True, slots=True, eq=False)
class CutGrid:
    """The cut figure's cells. Columns are units by descending score within their layer.

    order: int [L, U], the unit in each column.     state: int [L, U], 0 dropped, 1 kept, 2 + i kept only by reasons[i].
    near_tie: bool [L, U].                          kept: int [L], kept units per layer.
    """

    layers: tuple[int, ...]
    order: I64
    state: I64
    near_tie: NDArray[np.bool_]
    kept: I64
    reasons: tuple[str, ...]
    by_score: bool


def cut_grid(data: ReportData) -> CutGrid | None:
    """Sort every layer's units by the plan's own scores (ties by index) and say what became of each.

    Without those scores the kept units come first. None when there is no plan or it has no layers.
    """
    if data.plan is None or not data.layers or not data.plan.units:
        return None
    shape = (len(data.layers), data.plan.units)
    keep = np.zeros(shape, bool)
    for row, layer in enumerate(data.layers):
        keep[row, list(data.plan.layers[layer].keep)] = True
    scores = data.plan_scores
    values = scores.values if scores is not None else keep.astype(np.float64)
    order = np.argsort(-values, axis=1, kind="stable")
    state = keep.astype(np.int64)
    needed = keep.copy()
    if scores is not None:  # a protected unit whose score is high enough would have stayed anyway
        place = np.argsort(order, axis=1)
        needed &= place >= keep.sum(axis=1, keepdims=True)
    protected = dict(data.protected)
    if scores is not None and scores.protected is not None and not protected:
        protected = {scores.why or "floor": scores.protected}
    reasons = tuple(name for name, mask in protected.items() if bool((mask & needed).any()))
    for i, reason in reversed(list(enumerate(reasons))):
        state[protected[reason] & needed] = 2 + i
    near = np.zeros(shape, bool)
    if data.keep_probability is not None:
        near = (data.keep_probability > NEAR_TIE[0]) & (data.keep_probability < NEAR_TIE[1])
    rows = np.arange(shape[0])[:, None]
    return CutGrid(
        layers=data.layers,
        order=order,
        state=state[rows, order],
        near_tie=near[rows, order],
        kept=keep.sum(axis=1),
        reasons=reasons,
        by_score=scores is not None,
    )


def mass_over_uniform(statistics: Statistics) -> tuple[F64, str]:
    """Share of a class's router mass that goes to each expert, over the uniform share.

        M[c,l,e] = E · Σg[c,l,e] / Σ_e Σg[c,l,e]        1 = as much as every expert would get

    Returns float64 [C, L, E] with columns sorted within each layer by the pooled share, most first, and the name of the
    sum that was used: `g`, or `n` where the gates were not recorded. A class without tokens in a layer gives zeros.
    """
    name = "g" if "g" in statistics.by_class else "n"
    sums = np.asarray(statistics.by_class[name], np.float64)
    shares = _normalised(sums) * sums.shape[2]
    order = np.argsort(-sums.sum(axis=0), axis=1, kind="stable")
    return np.take_along_axis(shares, np.broadcast_to(order, shares.shape), axis=2), name


def _normalised(counts: F64) -> F64:
    """Divide by the sum over the last axis; rows that sum to 0 stay 0."""
    total = counts.sum(axis=-1, keepdims=True)
    out: F64 = np.zeros_like(counts)
    np.divide(counts, total, out=out, where=total > 0)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Specialisation:
    """How far each class's routing lies from the routing of the other classes.

    distance, low, high: float64 [C, L], total variation in [0, 1] and its 95 % interval over questions.
    chance: float64 [L], the 97.5 % point of the largest class distance when class labels are shuffled over questions.
    """

    classes: tuple[str, ...]
    layers: tuple[int, ...]
    questions: tuple[int, ...]
    distance: F64
    low: F64
    high: F64
    chance: F64
    rounds: int


def _distance(by_class: F64) -> F64:
    """½ Σ_e |p_c − p_others| for counts [..., C, L, E] → [..., C, L]."""
    others = by_class.sum(axis=-3, keepdims=True) - by_class
    return np.asarray(0.5 * np.abs(_normalised(by_class) - _normalised(others)).sum(axis=-1))


def specialisation(statistics: Statistics, *, rounds: int = 200, seed: int = 0) -> Specialisation | None:
    """Total variation between a class's routed tokens and those of all other classes, per layer.

        D[c,l] = ½ Σ_e | n[c,l,e]/Σn[c,l] − n[¬c,l,e]/Σn[¬c,l] |      0 = the same experts, 1 = none in common

    Intervals: basic percentile bootstrap over questions within each class, re-centred on the estimate, because a
    resampled distance is biased upwards (|p − q| is convex). float64 throughout. None for fewer than two classes with
    at least two questions each, or without per-question counts.
    """
    meta = statistics.meta
    if "n" not in statistics.by_question or len(meta.classes) < 2 or not meta.layers:
        return None
    counts = np.asarray(statistics.by_question["n"], np.float64)  # [Q, L, E]
    labels = np.array([meta.classes.index(question.cls) for question in meta.questions])
    members = [np.flatnonzero(labels == c) for c in range(len(meta.classes))]
    if min(len(m) for m in members) < 2 or len(counts) != len(labels):
        return None
    flat = counts.reshape(len(counts), -1)  # [Q, L·E]
    indicator = np.stack([labels == c for c in range(len(meta.classes))]).astype(np.float64)  # [C, Q]

    def distances(weights: F64) -> F64:
        """Weights [R, C, Q] → distances [R, C, L], in one product: many small ones are slow on a busy machine."""
        sums = weights.reshape(-1, len(counts)) @ flat
        return _distance(sums.reshape(*weights.shape[:2], *counts.shape[1:]))

    distance = distances(indicator[None])[0]
    rng = np.random.default_rng(seed)
    drawn, shuffled = [], []
    for start in range(0, rounds, _ROUNDS_AT_ONCE):
        weights = np.zeros((min(_ROUNDS_AT_ONCE, rounds - start), *indicator.shape))
        for row in weights:
            for c, m in enumerate(members):
                row[c] = np.bincount(rng.choice(m, len(m)), minlength=len(labels))
        drawn.append(distances(weights))
        mixed = np.stack([indicator[:, rng.permutation(len(labels))] for _ in weights])
        shuffled.append(distances(mixed).max(axis=1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0) + (
        distance - np.concatenate(drawn).mean(axis=0)
    )
    return Specialisation(
        classes=meta.classes,
        layers=meta.layers,
        questions=tuple(len(m) for m in members),
        distance=distance,
        low=np.clip(low, 0, 1),
        high=np.clip(high, 0, 1),
        chance=np.percentile(np.concatenate(shuffled), 97.5, axis=0),
        rounds=rounds,
    )
