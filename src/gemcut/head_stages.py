"""Stages of a head cut: importance, plan, heal, cut, canary, and the search for the layers that may stay cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcut import plan as planning
from gemcut import store, surgery
from gemcut.canary import CanarySettings, against, base_of
from gemcut.canary.settings import Limits
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.families.heads import mode_of
from gemcut.plan.salvage import Salvaged, keep_layers, salvage
from gemcut.recipe import CanaryWords, Choice, HeadWords, HealWords, layers_of
from gemcut.records.canary import Answers, CanaryResult, save_canary
from gemcut.records.heal import HEAL_FILE, HealReport, load_heal
from gemcut.records.importance import save_importance
from gemcut.score.heads import head_criterion_named, score_heads
from gemcut.types import HeadImportance, Json, Plan

if TYPE_CHECKING:
    from gemcut.stream.corpus import Corpus
    from gemcut.surgery.heal.settings import HealSettings

Progress = Callable[[int, int, str], None]

SALVAGE = "salvage.json"


# ---------------------------------------------------------------- importance and plan


def importance(
    base: Checkpoint,
    corpus: Corpus,
    method: str,
    out: Path | None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> HeadImportance:
    """What the loss says about every head: "loo" or "taylor", on a corpus; kept in a folder where `out` is given."""
    from gemcut.ablate import AblateSettings, loo, taylor
    from gemcut.stream.devices import use_free_cores

    methods = {"loo": loo, "taylor": taylor}
    if method not in methods:
        raise UsageError("there is no such method", got=method, wanted=" or ".join(methods))
    if out is not None:
        store.refuse_existing(out, force=force)
    use_free_cores()
    settings = AblateSettings(device=device, dtype=None if dtype == "auto" else dtype)
    found = methods[method](base, corpus, settings, progress=progress)
    if out is not None:
        save_importance(found, out, force=force)
    return found


def head_count(base: Checkpoint, drop: float) -> int:
    """Query heads that a share (below 1) or a count means for one layer."""
    heads = next((site.units for site in base.sites if site.kind == "heads"), 0)
    return int(drop) if drop >= 1 else int(drop * heads + 0.5)


def plan_heads(
    base: Checkpoint,
    statistics: Path,
    choice: Choice,
    words: HeadWords,
    measured: HeadImportance | None = None,
    *,
    gguf_only: bool = False,
    progress: Progress | None = None,
) -> planning.PlannedHeads:
    """Score by one criterion and decide which query heads stay.

    Args:
        measured: for criteria that need the whole model (`loo`, `taylor`).
        gguf_only: see `plan.plan_heads`.
    """
    layers = layers_of(words.layers)
    rows = _rows_of(base, measured, choice.criterion, layers)
    scores = score_heads(
        base,
        statistics,
        choice.criterion,
        drop=head_count(base, words.drop),
        mode=words.mode,
        layers=layers,
        importance=rows,
        params=choice.params,
        progress=progress,
    )
    names = base.tensors.keys()
    every = sorted({site.layer for site in base.sites if site.kind == "heads"})
    shapes = {layer: base.family.attention(base.text_config, names, layer) for layer in every}
    return planning.plan_heads(scores, shapes, drop=words.drop, layers=layers, mode=words.mode, gguf_only=gguf_only)


def _rows_of(
    base: Checkpoint, measured: HeadImportance | None, criterion: str, layers: tuple[int, ...] | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    if not head_criterion_named(criterion).measured:
        return None
    if measured is None:
        raise UsageError(
            f"the criterion {criterion!r} is measured on the whole model",
            hint=f"gemcut ablate MODEL --method {criterion} -o DIR, then plan heads … --importance DIR",
        )
    if measured.model_fingerprint != base.fingerprint:
        raise UsageError("the importance was measured on another model", where=base.name)
    if measured.method != criterion:
        raise UsageError("the importance is of another method", got=measured.method, wanted=criterion)
    wanted = measured.layers if layers is None else layers
    absent = sorted(set(wanted) - set(measured.layers))
    if absent:
        raise UsageError("the importance says nothing about a layer", where=f"layer {absent[0]}")
    return measured.values[[measured.layers.index(layer) for layer in sorted(wanted)]]


# ---------------------------------------------------------------- heal and cut


def heal(
    base: Checkpoint,
    plan: Plan,
    corpus: Corpus,
    words: HealWords,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> HealReport:
    """Refit what is left of each output projection; goes on where a killed heal stopped."""
    from gemcut.stream.devices import use_free_cores
    from gemcut.surgery.heal.stream import heal as room

    use_free_cores()
    return room(base, plan, corpus, out, settings=heal_settings(words), force=force, progress=progress)


def heal_settings(words: HealWords) -> HealSettings:
    """The room's settings from the recipe's words."""
    from gemcut.surgery.heal.settings import HealSettings

    return HealSettings(
        method=words.method,
        target=words.target,
        experts=words.experts,
        heal_all=words.whole_layers,
        ridges=words.ridges,
        device=words.device,
        dtype=None if words.dtype == "auto" else words.dtype,
    )


# ---------------------------------------------------------------- canary and salvage


def canary_settings(words: CanaryWords) -> CanarySettings:
    """The room's settings from the recipe's words."""
    return CanarySettings(
        max_new_tokens=words.max_new_tokens,
        dtype=None if words.dtype == "auto" else words.dtype,
        device=words.device,
        limits=Limits(newly_broken=words.newly_broken, nll_ratio=words.nll_ratio),
    )


def canary(
    base: Checkpoint,
    candidate: Path,
    words: CanaryWords,
    answers_file: Path,
    record: Path,
    *,
    progress: Progress | None = None,
) -> CanaryResult:
    """Ask the candidate what the base was asked; the base's answers are kept beside for the next candidate."""
    settings = canary_settings(words)
    answers = base_of(base, settings, answers_file, progress)
    result = against(answers, open_checkpoint(candidate), settings, progress)
    save_canary(result, record)
    return result


def damage_of(base: Checkpoint, plan: Plan, statistics: Path, healed: Path | None) -> dict[int, float]:
    """Harm of each layer's cut, for the order of the search; relative to the layer's branch, so that layers compare.

        D(l) = Σ_{h dropped} S_l[h] / Σ_h S_l[h],   S the criterion `norm`

    or, where a heal measured it, what the layer's own cut adds to the held-out residual (`LayerHeal.harm`). What the
    plan's own criterion says is no harm: positions of a search (`obs`), or units of its own.
    """
    if healed is not None:
        return {one.layer: one.harm for one in load_heal(healed / HEAL_FILE).layers if one.layer in plan.layers}
    dropped = {layer: list(one.drop) for layer, one in plan.layers.items() if one.drop}
    scores = score_heads(base, statistics, "norm", drop=0, layers=dropped)
    return {
        layer: float(values[dropped[layer]].sum() / values.sum())
        for layer, values in zip(scores.layers, scores.values, strict=True)
    }


def rescue(
    base: Checkpoint,
    plan: Plan,
    statistics: Path,
    healed: Path | None,
    words: CanaryWords,
    answers_file: Path,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> Plan:
    """Search the largest set of layers that passes the canary, when all of them failed it; the plan of that set.

    Every trial is written, asked, recorded and removed.

    Raises:
        QualityError: not one layer passes, or the plan is structural: its layers cannot be restored one by one.
    """
    if mode_of(plan) == "structural":
        raise QualityError(
            "a structural cut cannot be salvaged: config.json has one head count for all layers",
            hint="drop fewer heads, or plan with mode mask",
        )
    damage = damage_of(base, plan, statistics, healed)
    settings = canary_settings(words)
    answers: Answers = base_of(base, settings, answers_file, progress)

    def passes(layers: tuple[int, ...]) -> bool:
        out = folder / "trial"
        surgery.cut(base, keep_layers(plan, layers), out, healed=healed, force=True)
        result = against(answers, open_checkpoint(out, base.name), settings, progress)
        shutil.rmtree(out)
        return result.passed

    found = salvage(damage, passes, whole_failed=True)
    store.write_json(folder / SALVAGE, salvage_record(found, damage))
    if not found.layers:
        raise QualityError(
            "not one layer of the cut passes the canary; the work is kept",
            got=f"{len(found.trials)} sets of layers tried",
            hint="drop fewer heads, heal on more text, or loosen canary.newly_broken",
        )
    return keep_layers(plan, found.layers)


def salvage_record(found: Salvaged, damage: Mapping[int, float]) -> dict[str, Json]:
    """salvage.json: what was tried, in order, and what stayed."""
    return {
        "schema": 1,
        "kept_layers": list(found.layers),
        "restored_layers": list(found.restored),
        "damage": {str(layer): value for layer, value in sorted(damage.items())},
        "trials": [{"layers": list(trial.layers), "passed": trial.passed} for trial in found.trials],
    }
