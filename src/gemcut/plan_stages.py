"""From statistics to a plan of experts: criteria, tables of scores, plans kept with how sure each decision is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from gemcut import plan as planning
from gemcut import records, score, store
from gemcut.errors import UsageError
from gemcut.recipe import Choice, GuardWords, PlanWords
from gemcut.score.heads import HEAD_CRITERIA, HeadCriterion
from gemcut.stages import PLAN, SCORES, save_plan

if TYPE_CHECKING:
    from gemcut.reporting import Planned as Kept

_HEADS = "heads/"
DOUBT = "doubt.safetensors"  # keep probabilities and guarded units of the plan beside it


def criteria() -> dict[str, str]:
    """Names of the criteria and what each says in one line; those for attention heads begin with `heads/`."""
    heads = {f"{_HEADS}{name}": one.about for name, one in HEAD_CRITERIA.items()}
    return {name: one.about for name, one in score.CRITERIA.items()} | heads


def criterion_text(name: str) -> str:
    """Definition, source and parameters of one criterion."""
    one: score.Criterion | HeadCriterion
    one = HEAD_CRITERIA[name.removeprefix(_HEADS)] if name.startswith(_HEADS) else score.CRITERIA[name]
    lines = [f"{name}: {one.about}", "", _definition(one), "", f"source: {one.source}"]
    if one.params:
        lines += ["", "parameters:"]
        lines += [f"  {key} = {param.default!r}" for key, param in one.params.items()]
    return "\n".join(lines)


def _definition(one: score.Criterion | HeadCriterion) -> str:
    """The formula is the ranking function's docstring: one place, beside the code."""
    return inspect.cleandoc(one.rank.__doc__ or "")


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One layer under one criterion. agreement: share of its drops, at half the experts, that frequency drops too."""

    criterion: str
    layer: int
    best: tuple[int, ...]
    worst: tuple[int, ...]
    agreement: float


def score_table(
    statistics: Path, criterion: str, params: Mapping[str, object], out: Path | None, *, force: bool = False
) -> list[ScoreRow]:
    """Best and worst experts per layer, of one criterion or of all."""
    stats = records.load_statistics(statistics)
    if criterion == "all":
        if out is not None or params:
            raise UsageError("-o and --param need one criterion", got="all", hint="--criterion NAME")
        found = score.score_all(stats)
    else:
        found = (score.score(stats, criterion, **params),)
        if out is not None:
            records.save_scores(found[0], out, force=force)
    half = stats.meta.experts // 2
    common = np.argsort(score.score(stats, "frequency").values, axis=1, kind="stable")[:, :half]
    rows = []
    for one in found:
        order = np.argsort(one.values, axis=1, kind="stable")
        for i, layer in enumerate(one.layers):
            shared = len(set(order[i, :half].tolist()) & set(common[i].tolist())) / max(half, 1)
            rows.append(
                ScoreRow(
                    one.criterion,
                    layer,
                    tuple(int(u) for u in order[i, ::-1][:6]),
                    tuple(int(u) for u in order[i, :6]),
                    shared,
                )
            )
    return rows


def guards(words: GuardWords) -> planning.Guards:
    """The room's guards from the recipe's words."""
    return planning.Guards(super_factor=words.super_factor, class_floor=words.class_floor)


def plan_experts(statistics: Path, choice: Choice, words: PlanWords) -> planning.Planned:
    """Score by one criterion and decide which experts stay."""
    stats = records.load_statistics(statistics)
    params: dict[str, object] = dict(choice.params)
    if "keep" in score.criterion_named(choice.criterion).params:
        params.setdefault("keep", words.keep)
    scores = score.score(stats, choice.criterion, **params)
    resampled = score.resample(stats, scores, words.guards.bootstrap, words.guards.seed)
    return planning.plan_experts(scores, words.keep, guards=guards(words.guards), stats=stats, resampled=resampled)


def plan(statistics: Path, choice: Choice, words: PlanWords, folder: Path, *, force: bool = False) -> planning.Planned:
    """`plan_experts`, kept in a folder: plan.json, scores, and how sure each decision is."""
    planned = plan_experts(statistics, choice, words)
    records.save_scores(planned.scores, folder / SCORES, force=force)
    doubt: dict[str, np.ndarray] = {}
    if planned.keep_probability is not None:
        doubt["keep_probability"] = planned.keep_probability
    for (row, unit), reason in planned.guarded.reasons.items():
        name = "guard:" + guard_name(reason, planned.scores.why)
        doubt.setdefault(name, np.zeros(planned.scores.values.shape, np.bool_))[row, unit] = True
    doubt.setdefault("none", np.zeros(1, np.bool_))
    store.write_bytes(folder / DOUBT, save_tensors(doubt))
    save_plan(planned.plan, folder / PLAN, force=force)
    return planned


def guard_name(reason: str, own: str) -> str:
    """Which guard a reason comes from."""
    if reason.startswith("super expert"):
        return "super expert"
    if reason.startswith("among the best"):
        return "class floor"
    return own or "criterion's own floor"


def load_planned(folder: Path) -> Kept:
    """What `plan` kept."""
    from gemcut.reporting import Planned as Kept

    tensors = load_tensors((folder / DOUBT).read_bytes())
    return Kept(
        plan=records.load_plan(folder / PLAN),
        scores=records.load_scores(folder / SCORES),
        keep_probability=tensors.get("keep_probability"),
        protected={name.removeprefix("guard:"): mask for name, mask in tensors.items() if name.startswith("guard:")},
    )


def explain(planned: planning.Planned, statistics: Path, layer: int, unit: int) -> planning.Explanation:
    """Why one unit stays or goes, under this plan and under every other criterion."""
    stats = records.load_statistics(statistics)
    others = [one for one in score.score_all(stats) if one.criterion != planned.scores.criterion]
    return planning.explain(planned, planned.scores, stats, layer, unit, others=others)
