"""Scores and a budget to a Plan: which experts stay, and one line why each of the others goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import UsageError
from gemcut.plan.guards import Guarded, Guards, apply
from gemcut.types import F64, I64, Json, LayerPlan, Plan, Scores, Statistics

DOUBTFUL = 0.2  # a decision that turns out the other way in more than one of five resamples


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan with what decided it.

    keep_probability: float64 [L, U], the share of resamples in which the unit stays; None without resamples.
    guarded: the units that a guard keeps, whatever their score.
    """

    plan: Plan
    scores: Scores
    guarded: Guarded
    keep_probability: F64 | None

    @property
    def doubtful(self) -> int:
        """Decisions that turn out the other way in more than one of five resamples of the questions."""
        if self.keep_probability is None:
            return 0
        kept = kept_matrix(self.plan)
        against = np.where(kept, 1 - self.keep_probability, self.keep_probability)
        return int((against > DOUBTFUL).sum())

    @property
    def kept_by_guards(self) -> int:
        """Units that stay only because a guard keeps them: their score alone would have dropped them."""
        kept = kept_matrix(self.plan)
        keep = int(kept[0].sum())
        alone = select(self.scores.values, np.zeros_like(kept), keep)
        return int((kept & ~alone).sum())


def kept_matrix(plan: Plan) -> NDArray[np.bool_]:
    """bool [L, U], rows in layer order."""
    out = np.zeros((len(plan.layers), plan.units), np.bool_)
    for row, layer in enumerate(sorted(plan.layers)):
        out[row, list(plan.layers[layer].keep)] = True
    return out


def places(values: F64) -> I64:
    """Each unit's place along the last axis, 0 for the highest value; equal values by lower index."""
    order = np.argsort(-values, axis=-1, kind="stable")
    out = np.empty_like(order)
    np.put_along_axis(out, order, np.broadcast_to(np.arange(values.shape[-1]), values.shape).copy(), axis=-1)
    return out.astype(np.int64)


def select(values: F64, guarded: NDArray[np.bool_], keep: int) -> NDArray[np.bool_]:
    """Guarded units first, then the highest values; exactly `keep` per layer. [..., L, U] to bool [..., L, U]."""
    units = values.shape[-1]
    shifted = places(values) + np.where(guarded, 0, units)
    chosen: NDArray[np.bool_] = places(-shifted.astype(np.float64)) < keep
    return chosen


def check_keep(keep: int, units: int, top_k: int) -> None:
    """Refuse a budget that the router cannot fill or the layer does not have.

    Raises:
        UsageError: with the legal bounds.
    """
    if keep < top_k:
        raise UsageError(
            "the plan keeps fewer experts than the router picks",
            got=f"keep = {keep}",
            wanted=f"at least {top_k} (the router's top-k)",
            hint=f"keep {top_k} to {units}",
        )
    if keep > units:
        raise UsageError("there are not so many experts", got=f"keep = {keep}", wanted=f"at most {units}")


def plan_experts(
    scores: Scores,
    keep: int,
    *,
    guards: Guards | None = None,
    stats: Statistics | None = None,
    top_k: int | None = None,
    resampled: F64 | None = None,
) -> Planned:
    """Keep `keep` experts of every layer: guarded ones first, then by score, equal scores by lower index.

    Args:
        stats: what the scores came from; super experts and class floors need it.
        top_k: the router's; taken from `stats` when not given.
        resampled: float64 [B, L, U], the same criterion on B resamples of the questions. The guards of the full data
            are held fixed while the ranking is done again in each.

    Raises:
        UsageError: keep below the router's top-k or above the number of units, floors that do not fit, or statistics
            that the scores do not come from.
        QualityError: more super experts than units to keep.
    """
    guards = guards or Guards()
    if stats is not None and stats.fingerprint != scores.statistics_fingerprint:
        raise UsageError(
            "the scores were made from other statistics",
            got=scores.statistics_fingerprint[:12],
            wanted=stats.fingerprint[:12],
        )
    if top_k is None:
        top_k = stats.meta.top_k if stats is not None else 1
    check_keep(keep, scores.units, top_k)
    if resampled is not None and resampled.shape[1:] != scores.values.shape:
        raise UsageError(
            "the resamples have another shape", got=resampled.shape[1:], wanted=f"{scores.values.shape} per draw"
        )
    guarded = apply(guards, scores, keep, stats)
    kept = select(scores.values, guarded.kept, keep)
    probability: F64 | None = None
    if resampled is not None and len(resampled):
        fixed = np.broadcast_to(guarded.kept, resampled.shape)
        probability = select(resampled, fixed, keep).mean(axis=0, dtype=np.float64)
    draws = 0 if resampled is None else len(resampled)
    layers = {
        layer: _layer_plan(scores, row, kept[row], guarded.kept[row], probability, draws)
        for row, layer in enumerate(scores.layers)
    }
    plan = Plan(
        kind=scores.kind,
        model_fingerprint=scores.model_fingerprint,
        units=scores.units,
        layers=layers,
        criterion=scores.criterion,
        params=_params(scores, keep, guards, guarded, draws),
        corpus_hash=scores.corpus_hash,
        statistics_fingerprint=scores.statistics_fingerprint,
    )
    return Planned(plan=plan, scores=scores, guarded=guarded, keep_probability=probability)


def _params(scores: Scores, keep: int, guards: Guards, guarded: Guarded, draws: int) -> dict[str, Json]:
    """Everything that a stranger needs to make the plan again, and what the guards did."""
    notes = list(guarded.notes)
    made_for = scores.params.get("keep")
    if isinstance(made_for, int) and made_for not in (0, keep) and scores.protected is not None:
        notes.append(f"the criterion's floors were made for keep = {made_for}, this plan keeps {keep}")
    by_layer: dict[str, Json] = {}
    own = scores.why or f"protected by {scores.criterion}"
    for row, layer in enumerate(scores.layers):
        # the criterion's own floors are hundreds of equal lines; the guards' are few and each matters
        lines: dict[str, Json] = {
            str(unit): text for (r, unit), text in sorted(guarded.reasons.items()) if r == row and text != own
        }
        if lines:
            by_layer[str(layer)] = lines
    return {
        "keep": keep,
        "score": dict(scores.params),
        "guards": guards.to_json(),
        "guarded": by_layer,
        "resamples": draws,
        "notes": list[Json](notes),
    }


def _layer_plan(
    scores: Scores,
    row: int,
    kept: NDArray[np.bool_],
    guarded: NDArray[np.bool_],
    probability: F64 | None,
    draws: int,
) -> LayerPlan:
    values = scores.values[row]
    place = places(values)
    free = np.flatnonzero(kept & ~guarded)
    drop = {}
    for unit in (int(u) for u in np.flatnonzero(~kept)):
        parts = [f"{scores.criterion} {values[unit]:.4g}", f"rank {place[unit] + 1} of {len(values)}"]
        if len(free):
            last = int(free[np.argmax(place[free])])
            parts.append(f"cut at {values[last]:.4g} (unit {last})")
        else:
            parts.append("every place is taken by a guard")
        ahead = int((guarded & (place > place[unit])).sum())
        if ahead:
            parts.append(f"{ahead} guarded units with lower scores stay")
        if probability is not None:
            parts.append(f"kept in {100 * probability[row, unit]:.0f} % of {draws} resamples")
        drop[unit] = ", ".join(parts)
    return LayerPlan(keep=tuple(int(u) for u in np.flatnonzero(kept)), drop=drop)
