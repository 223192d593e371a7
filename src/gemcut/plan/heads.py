"""Scores of query heads and a budget to a Plan that no KV head pays for alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from gemcut.errors import UsageError
from gemcut.families.base import Attention
from gemcut.families.heads import HEAD_MODES, HeadMode, kv_heads_after, legal_head_counts
from gemcut.plan.experts import places
from gemcut.types import F64, Json, LayerPlan, Plan, Scores


@dataclass(frozen=True, slots=True, eq=False)
class PlannedHeads:
    """A plan of query heads with what decided it.

    dropped: query heads per layer of the plan. kv_heads: layer → KV heads before and after.
    notes: what a reader should know before cutting; they are in the plan's params too.
    """

    plan: Plan
    scores: Scores
    dropped: int
    kv_heads: Mapping[int, tuple[int, int]]
    notes: tuple[str, ...]


def plan_heads(
    scores: Scores,
    shapes: Mapping[int, Attention],
    *,
    drop: float,
    layers: Collection[int] | None = None,
    mode: HeadMode = "mask",
    gguf_only: bool = False,
) -> PlannedHeads:
    """Drop the query heads with the lowest scores, evenly over the KV heads; equal scores drop the higher index first.

    mask        any number of heads; a KV head loses at most ⌈dropped / KV heads⌉ of its query heads; some layers or all
    structural  the same number of heads in every layer. A layer keeps all of its KV heads where they can lose equally
                many query heads each, else whole KV heads go with their query heads, lowest sum of scores first

    Args:
        shapes: layer → attention, at least of every layer that is cut; of every layer of the model for `structural`.
        drop: below 1 a share of the layer's heads, rounded to whole heads (halves up; a note says so); from 1 on a
            count per layer. 0 drops nothing.
        layers: the layers to cut; None is every layer that has scores. The others are not in the plan.
        gguf_only: a structural plan may leave layers whole, and layers of one type may keep different numbers of KV
            heads. config.json cannot say that, a GGUF file can: such a plan is for `gemcut gguf --plan`.

    Raises:
        UsageError: a share or count that drops no head or all of them, layers that do not exist or have no scores,
            scores of something else, or scores that were searched for another number of heads or another mode; for
            `structural` also a number of heads that the layers or the config cannot hold (the message names the nearest
            that they can), only some of the layers, shared keys and values.
    """
    if mode not in HEAD_MODES:
        raise UsageError("no such way to drop heads", got=repr(mode)[:60], wanted=" or ".join(HEAD_MODES))
    if gguf_only and mode != "structural":
        raise UsageError("only a structural plan can be for GGUF alone", got=mode, wanted="structural")
    if scores.kind != "heads":
        raise UsageError("these scores are not about heads", got=scores.kind, wanted="heads")
    chosen = _chosen(scores, shapes, layers)
    heads = _heads(scores, shapes, chosen)
    count, notes = _count(drop, heads)
    _refuse_other_question(scores, count, mode)
    kv_heads = {layer: (shapes[layer].kv_heads, shapes[layer].kv_heads) for layer in chosen}
    if mode == "structural":
        cut_ones = {layer: shapes[layer] for layer in chosen} if gguf_only else dict(shapes)
        _check_structural(cut_ones, chosen, heads, count)
        if not gguf_only:
            _check_one_config(cut_ones, heads - count)
        kv_heads = {layer: (one.kv_heads, kv_heads_after(one, heads - count) or 0) for layer, one in cut_ones.items()}
        whole_too = {layer: (one.kv_heads, one.kv_heads) for layer, one in shapes.items()} | kv_heads
        notes += _drafter_notes(shapes, whole_too)
    rows = {layer: row for row, layer in enumerate(scores.layers)}
    planned: dict[int, LayerPlan] = {}
    for layer in chosen:
        before, after = kv_heads[layer]
        whole = before - after  # KV heads that leave with their query heads
        cut = _drop_groups if whole else _drop_spread
        gone = cut(scores, rows[layer], shapes[layer], whole or count)
        planned[layer] = LayerPlan(tuple(u for u in range(heads) if u not in gone), dict(sorted(gone.items())))
        if released := _protected(scores, rows[layer], gone):
            notes.append(f"layer {layer}: {released} protected heads released, lowest scores first")
    plan = Plan(
        kind="heads",
        model_fingerprint=scores.model_fingerprint,
        units=heads,
        layers=planned,
        criterion=scores.criterion,
        params={
            "mode": mode,
            "drop": drop if drop < 1 else count,
            "dropped": count,
            "kept": heads - count,
            **({"gguf_only": True} if gguf_only else _kv_param(shapes, kv_heads, mode)),
            "score": dict(scores.params),
            "notes": list[Json](notes),
        },
        corpus_hash=scores.corpus_hash,
        statistics_fingerprint=scores.statistics_fingerprint,
    )
    return PlannedHeads(plan=plan, scores=scores, dropped=count, kv_heads=kv_heads, notes=tuple(notes))


# ---------------------------------------------------------------- what was asked for


def _chosen(scores: Scores, shapes: Mapping[int, Attention], layers: Collection[int] | None) -> tuple[int, ...]:
    chosen = tuple(sorted(set(scores.layers if layers is None else layers)))
    if not chosen:
        raise UsageError("no layer to cut")
    for have, what in (
        (shapes.keys(), "the model does not have"),
        (set(scores.layers), "the scores say nothing about"),
    ):
        if strange := [layer for layer in chosen if layer not in have]:
            raise UsageError(
                f"a layer that {what}",
                where=f"layer {strange[0]}",
                wanted=f"layers {min(have)} to {max(have)}" if have else None,
            )
    return chosen


def _heads(scores: Scores, shapes: Mapping[int, Attention], chosen: tuple[int, ...]) -> int:
    for layer in chosen:
        if shapes[layer].heads != scores.units:
            raise UsageError(
                "the scores are about another number of heads",
                where=f"layer {layer}",
                got=scores.units,
                wanted=shapes[layer].heads,
                hint="are they scores of another model?",
            )
    return scores.units


def _refuse_other_question(scores: Scores, count: int, mode: HeadMode) -> None:
    """Scores of a joint search name the set that is best for one number of heads, and say nothing of another."""
    for what, wanted in (("drop", count), ("mode", mode)):
        found = scores.params.get(what, wanted)
        if found != wanted:
            raise UsageError(
                "the scores were searched for another cut",
                where=f"{scores.criterion}, {what}",
                got=found,
                wanted=wanted,
                hint="score the heads again for this plan",
            )


def _count(drop: float, heads: int) -> tuple[int, list[str]]:
    """Heads to drop per layer, and a note where a share was rounded."""
    most = f"a share below 1, or a count of 1 to {heads - 1}"
    if isinstance(drop, bool) or not math.isfinite(drop) or drop < 0 or (drop >= 1 and drop != int(drop)):
        raise UsageError("not a number of heads to drop", got=drop, wanted=most)
    if drop >= 1 or drop == 0:
        count, notes = int(drop), list[str]()
    else:
        exact = drop * heads
        count = math.floor(exact + 0.5)
        if count == 0:
            raise UsageError(
                "the share is less than half a head",
                got=f"{drop:g} of {heads} heads",
                wanted=f"{0.5 / heads:g} or more",
            )
        close = math.isclose(exact, count, abs_tol=1e-9)
        notes = [] if close else [f"{drop:g} of {heads} heads is {exact:.4g}: {count} dropped per layer"]
    if count >= heads:
        raise UsageError("no head would stay", got=f"{count} of {heads} heads dropped", wanted=most)
    return count, notes


def _check_structural(shapes: Mapping[int, Attention], chosen: tuple[int, ...], heads: int, count: int) -> None:
    if absent := sorted(shapes.keys() - set(chosen)):
        raise UsageError(
            "a structural cut takes every layer: the config has one number of heads for all",
            got=f"{len(chosen)} of {len(shapes)} layers",
            wanted=f"layer {absent[0]} too",
            hint="mode mask can cut some layers and leave others; so can a plan for GGUF alone (gguf-only)",
        )
    if shared := [layer for layer, one in sorted(shapes.items()) if one.shares_kv]:
        raise UsageError(
            "layers that read the keys and values of another cannot lose heads, only have them masked",
            where=f"layer {shared[0]}",
            hint="plan with mode mask",
        )
    legal = legal_head_counts(shapes)
    wanted = heads - count
    if wanted not in legal:
        bad = next(layer for layer, one in sorted(shapes.items()) if kv_heads_after(one, wanted) is None)
        one = shapes[bad]
        near = [*[m for m in legal if m < wanted][-1:], *[m for m in legal if m > wanted][:1]]
        raise UsageError(
            "query heads could not stay on their KV heads with this number of them",
            where=f"layer {bad}: {one.heads} query heads on {one.kv_heads} KV heads",
            got=f"{wanted} query heads kept",
            wanted=f"{' or '.join(str(m) for m in near)} kept in every layer that is cut",
            hint=f"--drop {' or --drop '.join(str(heads - m) for m in near)}, or mode mask",
        )


def _check_one_config(shapes: Mapping[int, Attention], wanted: int) -> None:
    """config.json has one number of KV heads for all sliding layers and one for all full ones."""
    for full in (False, True):
        after = {kv_heads_after(one, wanted): layer for layer, one in shapes.items() if one.full is full}
        if len(after) > 1:
            raise UsageError(
                f"the {_type(full)} layers would keep different numbers of KV heads",
                where=f"layers {', '.join(str(layer) for layer in sorted(after.values()))}",
                got=", ".join(str(kv) for kv in after),
                wanted="one number: the config has one for all of them",
            )


# ---------------------------------------------------------------- which heads go


def _order(scores: Scores, row: int) -> tuple[list[int], F64]:
    """Units from the first to drop to the last, protected ones at the end; and each unit's score."""
    values = scores.values[row]
    late = np.zeros(len(values), np.bool_) if scores.protected is None else scores.protected[row]
    return [int(u) for u in np.argsort(np.where(late, 0, len(values)) + places(values))[::-1]], values


def _drop_spread(scores: Scores, row: int, one: Attention, count: int) -> dict[int, str]:
    """The `count` lowest heads of which no KV head loses more than ⌈count / KV heads⌉. Lowest sum under that rule."""
    order, values = _order(scores, row)
    place = places(values)
    most = -(-count // one.kv_heads)
    lost = [0] * one.kv_heads
    taken: list[int] = []
    for unit in order:
        if len(taken) < count and lost[unit // one.group] < most:
            lost[unit // one.group] += 1
            taken.append(unit)
    gone: dict[int, str] = {}
    for unit in taken:
        kv = unit // one.group
        parts = [f"{scores.criterion} {values[unit]:.4g}", f"rank {place[unit] + 1} of {one.heads}"]
        parts.append(f"KV head {kv} loses {lost[kv]} of {one.group}")
        if ahead := sum(place[other] > place[unit] for other in order if other not in taken):
            why = f"no KV head loses more than {most}" + ("" if scores.protected is None else ", or protected")
            parts.append(f"{ahead} with lower scores stay ({why})")
        gone[unit] = ", ".join(parts)
    return gone


def _drop_groups(scores: Scores, row: int, one: Attention, count: int) -> dict[int, str]:
    """All query heads of the `count` KV heads with the lowest sum of scores."""
    values = scores.values[row]
    place = places(values)
    sums = values.reshape(one.kv_heads, one.group).sum(axis=1, dtype=np.float64)
    late = np.zeros(one.kv_heads, np.bool_)
    if scores.protected is not None:
        late = scores.protected[row].reshape(one.kv_heads, one.group).any(axis=1)
    by_sum = places(sums)
    order = np.argsort(np.where(late, 0, one.kv_heads) + by_sum)[::-1]
    gone: dict[int, str] = {}
    for kv in (int(j) for j in order[:count]):
        for unit in range(kv * one.group, (kv + 1) * one.group):
            gone[unit] = (
                f"KV head {kv} leaves with its {one.group} query heads: sum {sums[kv]:.4g}, "
                f"rank {by_sum[kv] + 1} of {one.kv_heads}; {scores.criterion} {values[unit]:.4g}, "
                f"rank {place[unit] + 1} of {one.heads}"
            )
    return gone


def _protected(scores: Scores, row: int, gone: Collection[int]) -> int:
    return 0 if scores.protected is None else int(scores.protected[row][sorted(gone)].sum())


# ---------------------------------------------------------------- what the plan says


def _type(full: bool) -> str:
    return "full" if full else "sliding"


def _by_type(shapes: Mapping[int, Attention], kv_heads: Mapping[int, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """KV heads before and after by attention type, of the last layer of each."""
    return {_type(shapes[layer].full): kv_heads[layer] for layer in sorted(kv_heads)}


def _drafter_notes(shapes: Mapping[int, Attention], kv_heads: Mapping[int, tuple[int, int]]) -> list[str]:
    """A drafter has no keys of its own: it reads those of the trunk's last sliding and last full layer."""
    return [
        f"{kind} layers keep {after} of {before} KV heads: a drafter trained for {before} no longer fits"
        for kind, (before, after) in sorted(_by_type(shapes, kv_heads).items())
        if before != after
    ]


def _kv_param(
    shapes: Mapping[int, Attention], kv_heads: Mapping[int, tuple[int, int]], mode: HeadMode
) -> dict[str, Json]:
    if mode == "mask":
        return {}
    return {"kv_heads": {kind: list[Json](pair) for kind, pair in _by_type(shapes, kv_heads).items()}}
