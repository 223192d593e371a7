"""Fill the report's one input from what the stages left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from gemcut import machine, records
from gemcut.checkpoint import Checkpoint, inspect
from gemcut.recipe import PlanWords, Recipe, resolved, shipped
from gemcut.records.canary import CanaryResult
from gemcut.records.heal import HealReport
from gemcut.report import Check, CriterionNote, KldEntry, ModelFacts, ReportData, StageTime, write_report
from gemcut.report.canaries import canary_checks, canary_tables
from gemcut.report.heals import heal_checks, heal_tables
from gemcut.score import CRITERIA
from gemcut.score.heads import HEAD_CRITERIA
from gemcut.types import KldResult, Plan, Scores

DEMO_LIMIT = "Demo figures: measured on a small model that was trained for this purpose, not on a released one."


@dataclass(frozen=True, slots=True)
class Planned:
    """What the plan stage of one criterion left behind."""

    plan: Plan
    scores: Scores
    keep_probability: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None
    protected: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """What the headers say of one checkpoint, for people."""
    found = inspect(checkpoint)
    routed = sum(part.parameters for part in found.components if part.name == "experts")
    units = next((site.units for site in checkpoint.sites if site.kind == "experts"), None)
    top_k = found.experts_per_token
    card = _card_facts(checkpoint.path)
    hub = checkpoint.name if "/" in checkpoint.name else None
    return ModelFacts(
        name=checkpoint.name,
        architecture=found.architecture,
        dtype=next(iter(found.bytes_by_dtype)),
        parameters=found.parameters,
        size_bytes=found.size_bytes,
        components={part.name: part.size_bytes for part in found.components},
        layers=found.layers,
        fingerprint=checkpoint.fingerprint,
        units=units,
        top_k=top_k or None,
        active_parameters=found.parameters - routed + (routed * top_k // units if units else 0),
        hub_id=hub.partition("@")[0] if hub else None,
        licence=card.get("licence"),
        pipeline_tag=card.get("pipeline_tag"),
    )


def _card_facts(folder: Path) -> dict[str, str | None]:
    """Licence and pipeline tag as the base's own card states them; None where it does not."""
    try:
        text = (folder / "README.md").read_text("utf-8")
        head = text.split("---", 2)[1] if text.startswith("---") else ""
        front = yaml.safe_load(head) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        front = {}
    if not isinstance(front, dict):
        front = {}
    return {
        "licence": str(front["license"])[:80] if front.get("license") else None,
        "pipeline_tag": str(front["pipeline_tag"])[:80] if front.get("pipeline_tag") else None,
    }


def facts(
    recipe: Recipe,
    base: Checkpoint,
    candidate: Checkpoint,
    *,
    measured: Mapping[str, KldResult],
    times: Sequence[tuple[str, float, int]],
) -> ReportData:
    """What every report of a run says, whatever was cut."""
    chosen = recipe.score.name
    return ReportData(
        title=recipe.report.title or "",
        base=model_facts(base),
        candidate=model_facts(candidate),
        kld=tuple(KldEntry(name, result) for name, result in measured.items()),
        chosen=chosen if chosen in measured else None,
        manifest=records.load_manifest(candidate.path / "manifest.json"),
        stages=tuple(StageTime(name, seconds, peak) for name, seconds, peak in times),
        recipe=resolved(recipe),
        commands=commands(recipe),
        limits=(DEMO_LIMIT,) if base.name.startswith("demo:") else (),
        versions={"gemcut": version(), **machine.stack()},
        seeds={"bootstrap of the KLD": recipe.kld.seed} if recipe.kld else {},
        calibration_corpus=public_name(recipe.observe.corpus),
        evaluation_corpus=public_name(recipe.kld.corpus) if recipe.kld else "",
    )


def write_experts(
    recipe: Recipe,
    words: PlanWords,
    common: ReportData,
    *,
    statistics: Path,
    planned: Mapping[str, Planned],
    checks: Sequence[Check],
    heal: HealReport | None,
    out: Path,
) -> Path:
    """Write the page and the card of a cut of experts; returns index.html."""
    main = planned[recipe.score.name]
    used = {word.criterion for word in (recipe.score, *recipe.compare)}
    sampled = main.keep_probability is not None
    data = replace(
        common,
        title=common.title or f"{common.base.name}: {main.plan.units} → {words.keep} experts",
        plan=main.plan,
        scores={main.plan.criterion: main.scores},
        statistics=records.load_statistics(statistics),
        keep_probability=main.keep_probability,
        bootstrap_rounds=words.guards.bootstrap if sampled else 0,
        protected=main.protected,
        checks=(*checks, *heal_checks(heal)),
        seeds={"bootstrap of the plan": words.guards.seed, **common.seeds},
        criteria=tuple(CriterionNote(name, one.about, one.source) for name, one in CRITERIA.items() if name in used),
        extras=heal_tables(heal, "experts"),
    )
    return write_report(data, out, force=True).index_html


def write_heads(
    recipe: Recipe,
    common: ReportData,
    *,
    plan: Plan,
    restored: tuple[int, ...],
    checks: Sequence[Check],
    heal: HealReport | None,
    canary: CanaryResult | None,
    out: Path,
) -> Path:
    """Write the page and the card of a cut of heads; returns index.html.

    Args:
        restored: layers that were cut first and have the base's bytes again, because the canary failed with them.
    """
    one = HEAD_CRITERIA[recipe.score.criterion]
    dropped = max((len(layer.drop) for layer in plan.layers.values()), default=0)
    share = f"{dropped} of {plan.units} query heads in {len(plan.layers)} layers"
    data = replace(
        common,
        title=common.title or f"{common.base.name}: without {share}",
        plan=plan,
        checks=(*checks, *canary_checks(canary), *heal_checks(heal)),
        criteria=(CriterionNote(one.name, one.about, one.source),),
        extras=(*heal_tables(heal, "heads"), *canary_tables(canary)),
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


def commands(recipe: Recipe) -> tuple[str, ...]:
    """What a reader types to do it again, and to check the weights that came with this report."""
    ref = recipe.name if recipe.name in shipped() else "recipe.yaml"
    return (f"gemcut run {ref}", f"gemcut verify MODEL --base {public_name(recipe.model)}")


def public_name(ref: str) -> str:
    """Shipped names and hub ids as they are; of a path only the last part."""
    return ref if ref.startswith(("demo:", "hf://")) or not Path(ref).exists() else Path(ref).name


def version() -> str:
    """gemcut's own."""
    from gemcut import __version__

    return __version__
