"""Fill the report's one input from what the stages left in the run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import yaml

from gemcut import machine, nvfp4_stages, records
from gemcut.checkpoint import Checkpoint
from gemcut.comparing import FLOOR
from gemcut.export.mix.padding import weights_of
from gemcut.export.mix.sizes import role_of
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import GgufFile, open_gguf
from gemcut.gguf_stages import Quantised
from gemcut.inspection import inspect
from gemcut.nvfp4_stages import Packed
from gemcut.recipe import PlanWords, Recipe, resolved, shipped
from gemcut.records.canary import CanaryResult
from gemcut.records.heal import HealReport
from gemcut.report import Check, CriterionNote, KldEntry, ModelFacts, Quant, Quants, ReportData, StageTime, write_report
from gemcut.report.bits import Cell
from gemcut.report.canaries import canary_checks, canary_tables
from gemcut.report.heals import heal_checks, heal_tables
from gemcut.report.quants import How, Role
from gemcut.score import CRITERIA
from gemcut.score.heads import HEAD_CRITERIA
from gemcut.types import KldResult, Plan, Scores

_BLOCK = re.compile(r"blk\.(\d+)\.")
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
    quantised: Quantised | None = None,
    packed: Packed | None = None,
) -> ReportData:
    """What every report of a run says, whatever was cut."""
    chosen = recipe.score.name if recipe.score is not None else ""
    cut = recipe.plan is not None
    against = f"{base.name}, uncut" if cut else base.name
    return ReportData(
        title=recipe.report.title or "",
        base=model_facts(base),
        candidate=model_facts(candidate),
        kld=tuple(KldEntry(name, result) for name, result in measured.items()),
        chosen=chosen if chosen in measured else None,
        manifest=records.load_manifest(candidate.path / "manifest.json") if cut else None,
        stages=tuple(StageTime(name, seconds, peak) for name, seconds, peak in times),
        recipe=resolved(recipe),
        commands=commands(recipe),
        quants=None if quantised is None else quants(recipe, against, quantised, measured.get(chosen)),
        nvfp4=None if packed is None else nvfp4_stages.described(packed, against),
        checks=()
        if packed is None
        else tuple(replace(one, name=f"NVFP4: {one.name}") for one in (*packed.checks, *canary_checks(packed.canary))),
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
    assert recipe.score is not None  # it goes with a plan
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
        checks=(*checks, *heal_checks(heal), *common.checks),
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
    assert recipe.score is not None  # it goes with a plan
    one = HEAD_CRITERIA[recipe.score.criterion]
    dropped = max((len(layer.drop) for layer in plan.layers.values()), default=0)
    share = f"{dropped} of {plan.units} query heads in {len(plan.layers)} layers"
    data = replace(
        common,
        title=common.title or f"{common.base.name}: without {share}",
        plan=plan,
        checks=(*checks, *canary_checks(canary), *heal_checks(heal), *common.checks),
        criteria=(CriterionNote(one.name, one.about, one.source),),
        extras=(*heal_tables(heal, "heads"), *canary_tables(canary)),
        notes=_notes(plan, restored),
    )
    return write_report(data, out, force=True).index_html


def quants(recipe: Recipe, against: str, quantised: Quantised, cut: KldResult | None) -> Quants:
    """The GGUF files of a run as the report shows them."""
    measured = dict(quantised.measured)
    floor = measured.pop(FLOOR, None)
    files = []
    for one in quantised.files:
        result = measured.get(one.stem)
        role, how = cast(Role, one.role), cast(How, one.how)
        files.append(
            Quant(
                one.name, role, one.asked, how, one.size_bytes, one.bits_per_weight, one.imatrix, one.types, one.sha256,
                None if result is None else KldEntry(one.asked, result), one.expected, one.memory,
                bit_cells(open_gguf(quantised.folder / one.parts[0])) if role == "model" else (),
            )
        )  # fmt: skip
    return Quants(
        tuple(files),
        quantised.model.name,
        quantised.model.size_bytes,
        against,
        None if floor is None else KldEntry("BF16 (noise floor)", floor),
        None if cut is None else KldEntry("safetensors (the cut itself)", cut),
        _gguf_method(recipe),
    )


def bit_cells(file: GgufFile) -> tuple[Cell, ...]:
    """Every matrix of a file that is quantised, or could have been; bits of its weights, zeros of padding left out."""
    cells = []
    for ref in file.tensors.values():
        if len(ref.shape) < 2 or ref.kind is GgmlType.F32:
            continue
        block = _BLOCK.match(ref.name)
        elements = weights_of(file, ref)
        cells.append(
            Cell(
                role_of(ref.name), int(block[1]) if block else None, 8 * ref.size_bytes / elements, ref.kind.name,
                elements,
            )
        )  # fmt: skip
    return tuple(cells)


def _gguf_method(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    words = recipe.gguf
    assert words is not None
    corpus, rows = public_name(recipe.observe.corpus), []
    if words.imatrix is not None:
        variant = words.imatrix.variant + (f" for {words.imatrix.target}" if words.imatrix.target else "")
        rows.append(
            ("Importances", f"{variant}, observed on {corpus}; starved experts borrow {words.imatrix.prior} rows")
        )
    if words.solves:
        text = public_name(words.curvature.corpus) if words.curvature.corpus else corpus
        rows.append(
            (
                "Solved mixes",
                f"least expected KLD under the size: squared gradients on {text} × error of each type's quantiser",
            )
        )
    if words.overrides:
        rows.append(("Types by hand", ", ".join(words.overrides)))
    if words.pad_experts:
        rows.append(("Experts", "padded with zeros to a multiple of 256"))
    return tuple(rows)


def write_uncut(
    recipe: Recipe,
    base: Checkpoint,
    quantised: Quantised | None,
    packed: Packed | None,
    *,
    times: Sequence[tuple[str, float, int]],
    out: Path,
) -> Path:
    """Write the page and the card of a run that cut nothing; returns index.html."""
    data = facts(recipe, base, base, measured={}, times=times, quantised=quantised, packed=packed)
    if packed is not None and quantised is None:
        entry = data.nvfp4.kld if data.nvfp4 is not None else None
        data = replace(
            data,
            candidate=nvfp4_stages.model_facts(packed, data.base),
            kld=() if entry is None else (entry,),
            manifest=records.load_manifest(packed.folder / "manifest.json"),
            checks=(*packed.checks, *canary_checks(packed.canary)),
            extras=canary_tables(packed.canary),
        )
    made = [*(["GGUF"] if quantised is not None else []), *([data.nvfp4.scheme] if data.nvfp4 is not None else [])]
    title = data.title or f"{base.name} in {' and '.join(made)}"
    return write_report(replace(data, title=title), out, force=True).index_html


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
    folder = recipe.plan is not None or recipe.nvfp4 is not None
    check = (f"gemcut verify MODEL --base {public_name(recipe.model)}",) if folder else ()
    return (f"gemcut run {ref}", *check)


def public_name(ref: str) -> str:
    """Shipped names and hub ids as they are; of a path only the last part."""
    return ref if ref.startswith(("demo:", "hf://")) or not Path(ref).exists() else Path(ref).name


def version() -> str:
    """gemcut's own."""
    from gemcut import __version__

    return __version__
