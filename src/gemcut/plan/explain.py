"""Why one unit stays or goes, in one screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.errors import UsageError
from gemcut.plan.experts import Planned, places
from gemcut.plan.guards import largest_output, median_output
from gemcut.types import Plan, Scores, Statistics


@dataclass(frozen=True, slots=True)
class ClassUse:
    """What one class asks of the unit. share: of the class's routed places in the layer (uniform: 1/U)."""

    cls: str
    tokens: int
    share: float
    weighted_norm: float  # Σ g·‖f‖ over the layer's mean unit of this class; 1 is average


@dataclass(frozen=True, slots=True)
class Standing:
    """One criterion's opinion of the unit; rank 1 is the first to be kept."""

    criterion: str
    value: float
    rank: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A unit next to this one in the plan's ranking."""

    unit: int
    value: float
    rank: int
    kept: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a unit stays or goes. `above` has the nearest unit that beat it last, `below` the nearest it beat first."""

    layer: int
    unit: int
    units: int
    kept: bool
    reason: str
    guard: str | None
    tokens: int
    routed_share: float
    per_class: tuple[ClassUse, ...]
    standings: tuple[Standing, ...]
    f_max: float
    f_max_median: float
    keep_probability: float | None
    resamples: int
    cut_value: float | None
    above: tuple[Neighbour, ...]
    below: tuple[Neighbour, ...]

    def text(self) -> str:
        """At most forty lines of plain text."""
        verdict = "stays" if self.kept else "goes"
        lines = [f"layer {self.layer}, unit {self.unit}: {verdict}", f"  {self.reason}"]
        if self.guard:
            lines.append(f"  guard: {self.guard}")
        if self.kept and self.keep_probability is not None:  # a drop's reason says it already
            lines.append(
                f"  kept in {100 * self.keep_probability:.0f} % of {self.resamples} resamples of the questions"
            )
        times = f", {self.f_max / self.f_max_median:.1f} times" if self.f_max_median > 0 else ","
        lines += [
            f"  tokens routed here: {self.tokens:,} ({100 * self.routed_share:.2f} % of the layer's,"
            f" even would be {100 / self.units:.2f} %)",
            f"  largest output: {self.f_max:.4g}{times} the layer's median {self.f_max_median:.4g}",
            "  class             tokens    share   g·‖f‖ (1 = average unit)",
        ]
        shown = sorted(self.per_class, key=lambda use: -use.weighted_norm)[:10]
        lines += [
            f"    {use.cls[:14]:14} {use.tokens:9,} {100 * use.share:7.2f} %   {use.weighted_norm:.2f}" for use in shown
        ]
        if len(shown) < len(self.per_class):
            lines.append(f"    and {len(self.per_class) - len(shown)} classes more")
        ranks = [f"{s.criterion} {s.rank}" for s in self.standings]
        lines.append(f"  rank of {self.units}:")
        lines += [f"    {', '.join(ranks[i : i + 5])}" for i in range(0, len(ranks), 5)]
        lines += [f"  {self._neighbour('beaten by', n)}" for n in self.above]
        lines += [f"  {self._neighbour('beats', n)}" for n in self.below]
        return "\n".join(lines)

    @staticmethod
    def _neighbour(word: str, n: Neighbour) -> str:
        return f"{word} unit {n.unit} ({n.value:.4g}, rank {n.rank}, {'stays' if n.kept else 'goes'})"


def explain(
    planned: Planned | Plan,
    scores: Scores,
    stats: Statistics,
    layer: int,
    unit: int,
    *,
    others: Sequence[Scores] = (),
    resamples: int = 0,
) -> Explanation:
    """Everything about one unit.

    Args:
        planned: what `plan_experts` returned, or a plan from disk (then without guards and keep probability, but with
            the reasons the file holds).
        others: other criteria's scores of the same statistics, for their ranks.
        resamples: how many draws the keep probability rests on.

    Raises:
        UsageError: no such layer or unit, or a plan, scores and statistics that do not belong together.
    """
    plan = planned.plan if isinstance(planned, Planned) else planned
    row = _row(plan, scores, stats, layer, unit, others)
    one = plan.layers[layer]
    kept = unit not in one.drop
    values = scores.values[row]
    place = places(values)
    guard = (
        planned.guarded.reasons.get((row, unit)) if isinstance(planned, Planned) else _noted_guard(plan, layer, unit)
    )
    keep_set = set(one.keep)
    order = np.argsort(place)

    def neighbour(rank: int) -> Neighbour:
        other = int(order[rank])
        return Neighbour(other, float(values[other]), rank + 1, other in keep_set)

    here = int(place[unit])
    probability = planned.keep_probability if isinstance(planned, Planned) else None
    guarded = planned.guarded.kept[row] if isinstance(planned, Planned) else np.zeros(scores.units, np.bool_)
    free = [u for u in one.keep if not guarded[u]]
    cut = float(values[free].min()) if free else None
    why = f"{scores.criterion} {values[unit]:.4g}, rank {here + 1} of {scores.units}"
    if cut is not None:
        why += f", cut at {cut:.4g}"
    n = stats.by_class["n"][:, row]  # [C, E]
    total = float(n.sum())
    return Explanation(
        layer=layer,
        unit=unit,
        units=scores.units,
        kept=kept,
        reason=why if kept else one.drop[unit],
        guard=guard,
        tokens=int(n[:, unit].sum()),
        routed_share=float(n[:, unit].sum()) / total if total else 0.0,
        per_class=_class_uses(stats, row, unit),
        standings=tuple(
            _standing(s, row, unit) for s in (scores, *others) if s is scores or s.criterion != scores.criterion
        ),
        f_max=float(largest_output(stats)[row, unit]),
        f_max_median=float(median_output(stats)[row]),
        keep_probability=None if probability is None else float(probability[row, unit]),
        resamples=resamples or _count(plan),
        cut_value=cut,
        above=tuple(neighbour(r) for r in range(max(here - 2, 0), here)),
        below=tuple(neighbour(r) for r in range(here + 1, min(here + 3, scores.units))),
    )


def _row(plan: Plan, scores: Scores, stats: Statistics, layer: int, unit: int, others: Sequence[Scores]) -> int:
    if layer not in scores.layers or layer not in plan.layers:
        have = sorted(set(scores.layers) & set(plan.layers))
        raise UsageError(f"there is no layer {layer} with experts", wanted=f"one of {have}")
    if not 0 <= unit < scores.units:
        raise UsageError(f"there is no unit {unit}", wanted=f"0 to {scores.units - 1}")
    prints = {s.statistics_fingerprint for s in (scores, *others)}
    if prints != {stats.fingerprint} or plan.units != scores.units:
        raise UsageError(
            "the plan, the scores and the statistics do not belong together",
            got=f"{plan.units} and {scores.units} units, {len(prints | {stats.fingerprint})} different statistics",
            hint="score and plan again from these statistics",
        )
    return scores.layers.index(layer)


def _noted_guard(plan: Plan, layer: int, unit: int) -> str | None:
    guarded = plan.params.get("guarded")
    lines = guarded.get(str(layer)) if isinstance(guarded, dict) else None
    text = lines.get(str(unit)) if isinstance(lines, dict) else None
    return text if isinstance(text, str) else None


def _count(plan: Plan) -> int:
    draws = plan.params.get("resamples")
    return draws if isinstance(draws, int) else 0


def _standing(scores: Scores, row: int, unit: int) -> Standing:
    return Standing(scores.criterion, float(scores.values[row, unit]), int(places(scores.values[row])[unit]) + 1)


def _class_uses(stats: Statistics, row: int, unit: int) -> tuple[ClassUse, ...]:
    n, gf = stats.by_class["n"][:, row], stats.by_class["gf"][:, row]  # [C, E]
    out = []
    for c, cls in enumerate(stats.meta.classes):
        tokens, norm = float(n[c].sum()), float(gf[c].mean())
        out.append(
            ClassUse(
                cls=cls,
                tokens=int(n[c, unit]),
                share=float(n[c, unit]) / tokens if tokens else 0.0,
                weighted_norm=float(gf[c, unit]) / norm if norm else 0.0,
            )
        )
    return tuple(out)
