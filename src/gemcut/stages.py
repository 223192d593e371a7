"""One function per stage, used by the verbs and by the pipeline alike: open, call the room, keep the result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from gemcut import checkpoint, records, score, shipped, store, surgery
from gemcut import plan as planning
from gemcut.checkpoint import Checkpoint, VerifyReport, open_checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.recipe import Choice, CurvatureWords, GuardWords, HealWords, Measure, Observe, PlanWords
from gemcut.score.heads import HEAD_CRITERIA, HeadCriterion
from gemcut.types import Json, KldResult, Manifest, Plan

if TYPE_CHECKING:
    from gemcut.observe.settings import ObserveSettings
    from gemcut.report import Check
    from gemcut.reporting import Planned as Kept
    from gemcut.stream.corpus import Corpus

Progress = Callable[[int, int, str], None]

PLAN = "plan.json"
SCORES = "scores"
CHECKS = "checks.json"
_HEADS = "heads/"
DOUBT = "doubt.safetensors"  # keep probabilities and guarded units of the plan beside it


# ---------------------------------------------------------------- in


def read_corpus(
    ref: str,
    base: Checkpoint,
    max_tokens: int | None,
    max_tokens_per_item: int,
    *,
    max_items: int | None = None,
    chat_only: bool = False,
) -> Corpus:
    """Token rows of a corpus under the model's own tokenizer and template."""
    from gemcut.stream.corpus import load_corpus

    return load_corpus(
        shipped.corpus_path(ref),
        base.path,
        max_tokens_per_item=max_tokens_per_item,
        max_tokens=max_tokens,
        max_items=max_items,
        chat_only=chat_only,
    )


def corpus_of(words: Observe | HealWords | Measure | CurvatureWords, base: Checkpoint, otherwise: str = "") -> Corpus:
    """The corpus that a stage's words name, within their limits; `otherwise` where they name none."""
    return read_corpus(
        words.corpus or otherwise,
        base,
        words.max_tokens,
        words.max_tokens_per_item,
        max_items=words.max_items if isinstance(words, Observe) else None,
        chat_only=isinstance(words, Observe) and words.chat_only,
    )


# ---------------------------------------------------------------- observe


def observe(
    base: Checkpoint,
    corpus: Corpus,
    out: Path,
    words: Observe,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The streamed pass; goes on where a killed one stopped."""
    from gemcut.observe.run import observe as room
    from gemcut.stream.devices import use_free_cores

    use_free_cores()
    room(base, corpus, out, settings=observe_settings(words), force=force, progress=progress)
    return out


def observe_key(base: Checkpoint, corpus: Corpus, words: Observe) -> dict[str, object]:
    """What an observation depends on. What only bounds memory does not change the sums; the hash says which items."""
    settings = words.model_dump(
        mode="json", exclude={"corpus", "max_items", "chat_only", "max_memory_gib", "batch_tokens"}
    )
    return {"model": base.fingerprint, "corpus": corpus.hash, **settings}


def observe_settings(words: Observe) -> ObserveSettings:
    """The room's settings from the recipe's words."""
    from gemcut.observe.settings import ObserveSettings

    return ObserveSettings(
        device=words.device,
        dtype=None if words.dtype == "auto" else words.dtype,
        max_memory=None if words.max_memory_gib is None else int(words.max_memory_gib * 2**30),
        batch_tokens=words.batch_tokens,
        gram_tokens=words.gram_tokens,
    )


def statistics_summary(folder: Path) -> dict[str, Json]:
    """What an observation holds, for people."""
    meta = records.load_statistics_index(folder).meta
    per_class = {cls: sum(q.tokens for q in meta.questions if q.cls == cls) for cls in meta.classes}
    return {
        "tokens": meta.tokens,
        "items": len(meta.questions),
        "tokens_per_class": dict(per_class),
        "layers": len(meta.layers),
        "experts": meta.experts,
        "top_k": meta.top_k,
        "truncated_items": meta.truncated_items,
        "corpus_hash": meta.corpus_hash,
        "model_fingerprint": meta.model_fingerprint,
    }


# ---------------------------------------------------------------- score and plan


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


def save_plan(plan: Plan, path: Path, *, force: bool = False) -> None:
    """plan.json, never over an existing one without `force`."""
    records.save_plan(plan, path, force=force)


def explain(planned: planning.Planned, statistics: Path, layer: int, unit: int) -> planning.Explanation:
    """Why one unit stays or goes, under this plan and under every other criterion."""
    stats = records.load_statistics(statistics)
    others = [one for one in score.score_all(stats) if one.criterion != planned.scores.criterion]
    return planning.explain(planned, planned.scores, stats, layer, unit, others=others)


def diff_plans(a: Path, b: Path) -> planning.PlanDiff:
    """Drop by drop between two plan files."""
    return planning.diff_plans(records.load_plan(a), records.load_plan(b))


# ---------------------------------------------------------------- checkpoints


def cut(
    base: Checkpoint,
    plan_file: Path,
    out: Path,
    *,
    healed: Path | None = None,
    link: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the cut checkpoint, healed where there is a heal; the manifest comes from its bytes."""
    plan = records.load_plan(plan_file)
    return surgery.cut(base, plan, out, healed=healed, link=link, force=force, progress=progress)


def verify_cut(
    model: Path,
    base: Checkpoint,
    plan_file: Path | None,
    *,
    healed: Path | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Bytes against intent and record; CheckpointError where they disagree."""
    candidate = open_checkpoint(model)
    if plan_file is None:
        return checkpoint.verify(candidate, base, progress=progress)
    return surgery.verify_cut(candidate, base, records.load_plan(plan_file), healed=healed, progress=progress)


def verified(
    model: Path,
    base: Checkpoint,
    plan_file: Path,
    folder: Path,
    *,
    healed: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """`verify_cut`, with its answer kept for the report."""
    save_checks(checks(verify_cut(model, base, plan_file, healed=healed, progress=progress)), folder)


def save_checks(found: list[Check], folder: Path) -> None:
    """Keep what a verification rests on; only what passed ever gets here."""
    store.write_json(folder / CHECKS, {"checks": [{"name": c.name, "detail": c.detail} for c in found]})


def load_checks(folder: Path) -> list[Check]:
    """What `verified` kept: only what passed is ever kept."""
    from gemcut.report import Check

    listed = store.read_json(folder / CHECKS, "verification")["checks"]
    assert isinstance(listed, list)
    return [Check(str(c["name"]), True, str(c["detail"])) for c in listed if isinstance(c, dict)]


def checks(report: VerifyReport) -> list[Check]:
    """What a passed verification rests on, one line each."""
    from gemcut.report import Check

    layers = len(report.layers_changed)
    found = [
        Check(
            "tensors that changed",
            True,
            f"{report.tensors_changed} of {len(report.manifest.tensors)}, in {layers} layers",
        )
    ]
    if report.plan_checked:
        found.append(Check("bytes are what the plan asks for", True, "every kept unit, and nothing else"))
    if report.record_checked:
        found.append(Check("manifest.json and SHA256SUMS", True, f"{report.files_checked} files hashed again"))
    if report.files_unlisted:
        found.append(Check("files outside the record", True, ", ".join(report.files_unlisted[:5])))
    return found


# ---------------------------------------------------------------- measure


def kld(
    base: Checkpoint,
    candidates: Mapping[str, Path],
    corpus: Corpus,
    words: Measure,
    folder: Path | None,
    *,
    progress: Progress | None = None,
) -> dict[str, KldResult]:
    """All candidates against one pass of the base; kept as one JSON per candidate."""
    from gemcut.evaluate.kld import KldSettings
    from gemcut.evaluate.kld import kld as measure
    from gemcut.stream.devices import use_free_cores

    use_free_cores()
    models = [open_checkpoint(path, name) for name, path in candidates.items()]
    settings = KldSettings(device=words.device, dtype=words.dtype, seed=words.seed)
    results = measure(base, models, corpus, settings, progress=progress)
    return keep_kld(dict(zip(candidates, results, strict=True)), folder)


def keep_kld(results: dict[str, KldResult], folder: Path | None) -> dict[str, KldResult]:
    """The same results, written as one JSON each where a folder is given."""
    if folder is not None:
        for name, result in results.items():
            records.save_kld(result, folder / kld_file(name))
    return results


def kld_file(name: str) -> str:
    """File name of one candidate's result."""
    return "kld-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in name) + ".json"


def measured(folder: Path, names: list[str]) -> dict[str, KldResult]:
    """What `kld` kept."""
    return {name: records.load_kld(folder / kld_file(name)) for name in names}


def devices() -> list[str]:
    """Devices that torch sees."""
    from gemcut.stream.devices import device_names

    return list(device_names())


CUT_LESS = "cut less (--set plan.keep=… or plan.drop=…) or try another criterion (--set score.criterion=…)"


def kld_gate(words: Measure | None, measured: Mapping[str, KldResult], chosen: str, hint: str = CUT_LESS) -> None:
    """QualityError where the chosen candidate's mean KLD exceeds the recipe's gate; the work is kept."""
    limit = words.max_mean_nats if words else None
    if limit is None or chosen not in measured:
        return
    mean = next(row.mean for row in measured[chosen].rows if row.cls == "all")
    if mean.value > limit:
        raise QualityError(
            "the KLD gate failed; the work is kept",
            where=f"kld of {chosen}",
            got=f"{mean.value:.4f} nats [{mean.low:.4f}, {mean.high:.4f}] (n = {mean.n} chunks)",
            wanted=f"at most {limit:.4f}",
            hint=hint,
        )
