"""Fill the report of a head cut from what the stages left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemcut import machine, records
from gemcut.checkpoint import Checkpoint
from gemcut.recipe import Recipe, resolved
from gemcut.records.canary import CanaryResult, condition_name
from gemcut.records.heal import HEAL_FILE, HealReport, load_heal
from gemcut.report import Check, CriterionNote, Extra, KldEntry, ReportData, StageTime, Table, write_report
from gemcut.reporting import DEMO_LIMIT, commands, model_facts, public_name, version
from gemcut.score.heads import HEAD_CRITERIA
from gemcut.types import Estimate, Kind, KldResult, Plan


def write(
    recipe: Recipe,
    base: Checkpoint,
    candidate: Checkpoint,
    *,
    plan: Plan,
    restored: tuple[int, ...],
    heal: Path | None,
    canary: CanaryResult | None,
    checks: Sequence[Check],
    measured: Mapping[str, KldResult],
    times: Sequence[tuple[str, float, int]],
    out: Path,
) -> Path:
    """Write the page and the card; returns index.html.

    Args:
        restored: layers that were cut first and have the base's bytes again, because the canary failed with them.
    """
    report = load_heal(heal / HEAL_FILE) if heal is not None else None
    name = recipe.score.name
    one = HEAD_CRITERIA[recipe.score.criterion]
    dropped = max((len(layer.drop) for layer in plan.layers.values()), default=0)
    share = f"{dropped} of {plan.units} query heads in {len(plan.layers)} layers"
    data = ReportData(
        title=recipe.report.title or f"{base.name}: without {share}",
        base=model_facts(base),
        candidate=model_facts(candidate),
        plan=plan,
        kld=tuple(KldEntry(label, result) for label, result in measured.items()),
        chosen=name if name in measured else None,
        manifest=records.load_manifest(candidate.path / "manifest.json"),
        checks=(*checks, *_canary_checks(canary), *heal_checks(report)),
        stages=tuple(StageTime(stage, seconds, peak) for stage, seconds, peak in times),
        recipe=resolved(recipe),
        commands=commands(recipe),
        limits=(DEMO_LIMIT,) if base.name.startswith("demo:") else (),
        versions={"gemcut": version(), **machine.stack()},
        seeds={"bootstrap of the KLD": recipe.kld.seed} if recipe.kld else {},
        criteria=(CriterionNote(one.name, one.about, one.source),),
        calibration_corpus=public_name(recipe.observe.corpus),
        evaluation_corpus=public_name(recipe.kld.corpus) if recipe.kld else "",
        extras=(*heal_table(report), *_canary_table(canary)),
        notes=_notes(plan, restored),
    )
    return write_report(data, out, force=True).index_html


def _notes(plan: Plan, restored: tuple[int, ...]) -> tuple[str, ...]:
    listed = plan.params.get("notes")
    notes = [str(note) for note in listed] if isinstance(listed, list) else []
    if restored:
        several = "Layers" if len(restored) > 1 else "Layer"
        have = "have" if len(restored) > 1 else "has"
        numbers = ", ".join(map(str, restored))
        notes.append(
            f"{several} {numbers} {have} the base's bytes: the cut of all planned layers failed the canary, and what "
            "is written is the largest set of layers that passed among those tried."
        )
    return tuple(notes)


def _canary_checks(canary: CanaryResult | None) -> tuple[Check, ...]:
    if canary is None:
        return ()
    worst = max((c.nll_ratio.value for c in canary.conditions if c.nll_ratio is not None), default=1.0)
    text = f"{len(canary.conditions)} conditions, {canary.conditions[0].prompts} prompts each; largest NLL ratio "
    return (Check("canary: it still talks", canary.passed, f"{text}{worst:.3f}"),)


def heal_checks(report: HealReport | None) -> tuple[Check, ...]:
    """What a heal came to, in one line."""
    if report is None:
        return ()
    better = [one for one in report.layers if one.used]
    if not better:
        return (Check("heal", True, "no layer's heal beat the cut without it on held-out items: none is used"),)
    before = sum(one.held_out_before for one in better) / len(better)
    after = sum(one.held_out_after for one in better) / len(better)
    text = f"used in {len(better)} of {len(report.layers)} layers; mean held-out residual {before:.4f} → {after:.4f} "
    return (Check("heal, on held-out items", True, text + f"({report.tokens} tokens, {report.items} items)"),)


def heal_table(report: HealReport | None, *, kind: Kind = "heads") -> tuple[Extra, ...]:
    """A heal layer by layer."""
    if report is None:
        return ()
    rows = tuple(
        (
            str(one.layer),
            ", ".join(map(str, one.dropped)) or "–",
            f"{one.samples:,}",
            f"{one.ridge:g}",
            f"{one.condition:.1e}",
            f"{one.held_out_before:.4f}",
            f"{one.held_out_after:.4f}",
            "yes" if one.used else "no",
        )
        for one in report.layers
    )
    columns = ("Layer", "Dropped", "Samples", "Ridge", "Condition", "No heal", "Healed", "Used")
    branch, what = (
        ("attention branch", "each output projection")
        if kind == "heads"
        else ("experts' sum, after its best common factor,", "the scales of the experts that stay")
    )
    text = (
        f"Relative residual of the {branch} on {report.held_out_items} held-out of {report.items} items, "
        f"{report.method}, {what} refitted towards the original. A layer whose heal is no "
        "better keeps its old weights."
    )
    return (Extra("Heal, layer by layer", text, Table(columns, rows, "rrrrrrrl")),)


def _canary_table(canary: CanaryResult | None) -> tuple[Extra, ...]:
    if canary is None:
        return ()
    rows = tuple(
        (
            condition_name(c.style, c.bos),
            _share(c.base_broken),
            _share(c.candidate_broken),
            _share(c.newly_broken),
            f"{c.identical} of {c.prompts}",
            "–" if c.nll_ratio is None else f"{c.nll_ratio.value:.3f} [{c.nll_ratio.low:.3f}, {c.nll_ratio.high:.3f}]",
            "failed" if c.reasons else "passed",
        )
        for c in canary.conditions
    )
    columns = ("Condition", "Base broken", "Broken", "Newly broken", "Same answer", "NLL ratio", "")
    n = canary.conditions[0].prompts if canary.conditions else 0
    text = (
        f"Greedy answers to n = {n} prompts a condition, base and this model. Broken: a loop, repetition, a foreign "
        "script, a leaked marker, or nothing. NLL ratio: what the base's own answers cost this model, against the base."
    )
    return (Extra("Canary", text, Table(columns, rows, "lrrrrrl")),)


def _share(value: Estimate) -> str:
    return f"{100 * value.value:.0f} % [{100 * value.low:.0f}, {100 * value.high:.0f}]"
