"""Fill the report's one input from what the stages left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from gemcut import machine, records
from gemcut.checkpoint import Checkpoint, inspect
from gemcut.recipe import PlanWords, Recipe, resolved, shipped
from gemcut.report import Check, CriterionNote, Extra, KldEntry, ModelFacts, ReportData, StageTime, write_report
from gemcut.score import CRITERIA
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


def write(
    recipe: Recipe,
    base: Checkpoint,
    candidate: Checkpoint,
    *,
    statistics: Path,
    planned: Mapping[str, Planned],
    checks: Sequence[Check],
    measured: Mapping[str, KldResult],
    times: Sequence[tuple[str, float, int]],
    out: Path,
    extras: Sequence[Extra] = (),
) -> Path:
    """Write the page and the card; returns index.html."""
    chosen = recipe.score.name
    main = planned[chosen]
    words_of_plan = recipe.plan
    assert isinstance(words_of_plan, PlanWords)
    keep = words_of_plan.keep
    stats = records.load_statistics(statistics)
    words = [recipe.score, *recipe.compare]
    used = {word.criterion for word in words}
    data = ReportData(
        title=recipe.report.title or f"{base.name}: {main.plan.units} → {keep} experts",
        base=model_facts(base),
        candidate=model_facts(candidate),
        plan=main.plan,
        scores={main.plan.criterion: main.scores},
        statistics=stats,
        keep_probability=main.keep_probability,
        bootstrap_rounds=words_of_plan.guards.bootstrap if main.keep_probability is not None else 0,
        protected=main.protected,
        kld=tuple(KldEntry(name, measured[name]) for name in planned if name in measured),
        chosen=chosen if chosen in measured else None,
        manifest=records.load_manifest(candidate.path / "manifest.json"),
        checks=tuple(checks),
        stages=tuple(StageTime(name, seconds, peak) for name, seconds, peak in times),
        recipe=resolved(recipe),
        commands=commands(recipe),
        limits=(DEMO_LIMIT,) if base.name.startswith("demo:") else (),
        versions={"gemcut": version(), **machine.stack()},
        seeds={
            "bootstrap of the plan": words_of_plan.guards.seed,
            **({"bootstrap of the KLD": recipe.kld.seed} if recipe.kld else {}),
        },
        criteria=tuple(CriterionNote(name, one.about, one.source) for name, one in CRITERIA.items() if name in used),
        calibration_corpus=public_name(recipe.observe.corpus),
        evaluation_corpus=public_name(recipe.kld.corpus) if recipe.kld else "",
        extras=tuple(extras),
    )
    return write_report(data, out, force=True).index_html


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
