"""The stages of an NVFP4 checkpoint, behind a cut or without one: nvfp4 → verify → canary → kld.

    nvfp4-KEY/model/   verify-nvfp4-KEY/   canary-nvfp4-KEY/   kld-nvfp4-KEY/

As for GGUF files, a cut model is observed itself, and damage is measured against the base that the recipe names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemcut import head_stages, nvfp4_stages, stages
from gemcut.canary import CANARY, refuse_failed
from gemcut.checkpoint import Checkpoint
from gemcut.jobs import STATISTICS, Job
from gemcut.nvfp4_stages import MODEL, Packed
from gemcut.recipe import STAGES, CanaryWords, Measure, Nvfp4Words
from gemcut.records.canary import CanaryResult, load_canary
from gemcut.runs import Stage
from gemcut.types import KldResult

LABEL = "nvfp4"


def pack(job: Job, last: int, model: Checkpoint, cut: Stage | None = None) -> Packed | None:
    """Every stage up to the one numbered `last`; None where the recipe or `last` asks for no NVFP4 checkpoint.

    Args:
        model: to quantise.   cut: the stage that made it; None where it is the recipe's own.
    Raises:
        QualityError: the canary failed; the work is kept.
    """
    words = job.recipe.nvfp4
    if words is None or last < STAGES.index("nvfp4"):
        return None
    parents = () if cut is None else (cut.key,)
    observed = job.observe(model, "" if cut is None else "cut", parents) if words.observes else None
    statistics = None if observed is None else observed.folder / STATISTICS
    made = _export(job, words, model, statistics, (*parents, *(() if observed is None else (observed.key,))))
    checked = job.stage(
        "verify",
        LABEL,
        {"model": model.fingerprint},
        (made.key,),
        lambda folder: nvfp4_stages.verified(made.folder / MODEL, model, folder, progress=job.progress),
    )
    name = f"{model.name.rpartition('/')[2].partition('@')[0].replace(':', '-')}-{words.scheme}"
    checks = tuple(stages.load_checks(checked.folder))
    packed = Packed(made.folder / MODEL, name, model, statistics, words.drafter, checks)
    job.result.packed = packed
    if job.recipe.canary is not None:
        packed = job.result.packed = replace(packed, canary=_canary(job, job.recipe.canary, made))
    if last >= STAGES.index("kld") and job.recipe.kld is not None:
        packed = job.result.packed = replace(packed, measured=_measure(job, job.recipe.kld, made, name))
    return packed


def _export(job: Job, words: Nvfp4Words, model: Checkpoint, statistics: Path | None, behind: tuple[str, ...]) -> Stage:
    asked = words.model_dump(mode="json", exclude={"threads", "drafter"})
    return job.stage(
        "nvfp4",
        "",
        {"model": model.fingerprint, **asked},
        behind,
        lambda folder: nvfp4_stages.export(
            model, words, statistics, folder / MODEL, force=True, link=job.recipe.cut.link, progress=job.progress
        ),
    )


def _canary(job: Job, words: CanaryWords, made: Stage) -> CanaryResult:
    """The folder answers like the base, or the run ends here; what is written stays."""
    asked = job.stage(
        "canary",
        LABEL,
        {"model": job.base.fingerprint, **words.model_dump(mode="json", exclude={"salvage"})},
        (made.key,),
        lambda folder: head_stages.canary(
            job.base, made.folder / MODEL, words, job.answers(words), folder / CANARY, progress=job.progress
        ),
    )
    found = load_canary(asked.folder / CANARY)
    refuse_failed(found)
    return found


def _measure(job: Job, words: Measure, made: Stage, name: str) -> KldResult:
    """KLD of the folder against the recipe's base, as `gemcut kld` measures it."""
    corpus = stages.corpus_of(words, job.base)
    settings = words.model_dump(mode="json", exclude={"corpus", "max_mean_nats", "floor"})
    candidates: dict[str, Path] = {name: made.folder / MODEL}
    done = job.stage(
        "kld",
        LABEL,
        {"model": job.base.fingerprint, "corpus": corpus.hash, "candidates": [name], **settings},
        (made.key,),
        lambda folder: stages.kld(job.base, candidates, corpus, words, folder, progress=job.progress),
    )
    return stages.measured(done.folder, [name])[name]
