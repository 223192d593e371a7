"""One function per stage, used by the verbs and by the pipeline alike: open, call the room, keep the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import checkpoint, records, shipped, store, surgery
from gemcut import plan as planning
from gemcut.checkpoint import Checkpoint, VerifyReport, open_checkpoint
from gemcut.errors import QualityError
from gemcut.recipe import CurvatureWords, HealWords, Measure, Observe
from gemcut.types import Json, KldResult, Manifest, Plan

if TYPE_CHECKING:
    from gemcut.observe.settings import ObserveSettings
    from gemcut.report import Check
    from gemcut.stream.corpus import Corpus

Progress = Callable[[int, int, str], None]

PLAN = "plan.json"
SCORES = "scores"
CHECKS = "checks.json"


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


# ---------------------------------------------------------------- plans


def save_plan(plan: Plan, path: Path, *, force: bool = False) -> None:
    """plan.json, never over an existing one without `force`."""
    records.save_plan(plan, path, force=force)


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
