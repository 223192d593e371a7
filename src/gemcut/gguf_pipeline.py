"""The stages behind a cut, or without one: imatrix → curvature → gguf → kld of every file.

    imatrix-KEY/imatrix.gguf   curvature-KEY/curvature/   gguf-KEY/{files/*.gguf, files.json}   kld-gguf-KEY/

What is quantised is observed itself: after a cut, the cut model (`observe-cut-KEY`), because its router sends other
tokens to other experts. Damage is measured against the base that the recipe names, cut included.
"""

from __future__ import annotations

from pathlib import Path

from gemcut import gguf_stages, models, stages
from gemcut.checkpoint import Checkpoint
from gemcut.comparing import FLOOR, delete_leftovers
from gemcut.ggml.library import load
from gemcut.gguf_stages import Quantised
from gemcut.jobs import STATISTICS, Job
from gemcut.recipe import STAGES, GgufWords, Measure
from gemcut.runs import Stage
from gemcut.types import KldResult


def quantise(job: Job, last: int, model: Checkpoint, cut: Stage | None = None) -> Quantised | None:
    """Every stage up to the one numbered `last`; None where the recipe or `last` asks for no files.

    Args:
        model: to quantise.
        cut: the stage that made it; None where it is the recipe's own.
    """
    words = job.recipe.gguf
    if words is None or last < STAGES.index("imatrix"):
        return None
    for folder in job.result.folder.glob("kld-gguf-*"):  # also of other settings than this run's
        delete_leftovers(folder)
    parents = () if cut is None else (cut.key,)
    importances = None
    if wants_imatrix(words):
        importances = _imatrix(job, words, model, job.observe(model, "" if cut is None else "cut", parents))
    if last < STAGES.index("curvature"):
        return None
    slopes = _curvature(job, words, model, parents) if words.solves else None
    if last < STAGES.index("gguf"):
        return None
    files = _gguf(job, words, model, importances, slopes, parents)
    found = Quantised(model, files.folder / gguf_stages.FILES, gguf_stages.load_facts(files.folder))
    job.result.files = tuple(found.folder / name for one in found.files for name in one.parts)
    if last < STAGES.index("kld") or job.recipe.kld is None:
        return found
    measured = _measure(job, job.recipe.kld, files, found)
    job.result.quantised = measured
    return Quantised(found.model, found.folder, found.files, measured)


def wants_imatrix(words: GgufWords) -> bool:
    return words.imatrix is not None and (bool(words.tiers) or words.solves)


def _imatrix(job: Job, words: GgufWords, model: Checkpoint, observed: Stage) -> Stage:
    asked = words.imatrix
    assert asked is not None
    done = job.stage(
        "imatrix",
        "",
        {"model": model.fingerprint, **asked.model_dump(mode="json", exclude={"gate"})},
        (observed.key,),
        lambda folder: gguf_stages.imatrix(
            observed.folder / STATISTICS, model, asked, folder / gguf_stages.IMATRIX, progress=job.progress
        ),
    )
    if asked.gate:
        gguf_stages.imatrix_gate(done.folder / gguf_stages.IMATRIX, model)
    return done


def _curvature(job: Job, words: GgufWords, model: Checkpoint, parents: tuple[str, ...]) -> Stage:
    asked = words.curvature
    corpus = stages.corpus_of(asked, model, job.recipe.observe.corpus)
    return job.stage(
        "curvature",
        "",
        {"model": model.fingerprint, "corpus": corpus.hash, **asked.model_dump(mode="json", exclude={"corpus"})},
        parents,
        lambda folder: gguf_stages.curvature(
            model, corpus, asked, folder / gguf_stages.CURVATURE, force=True, progress=job.progress
        ),
    )


def _gguf(
    job: Job,
    words: GgufWords,
    model: Checkpoint,
    importances: Stage | None,
    slopes: Stage | None,
    parents: tuple[str, ...],
) -> Stage:
    imatrix = None if importances is None else importances.folder / gguf_stages.IMATRIX
    settings = words.model_dump(mode="json", exclude={"imatrix", "curvature", "threads"})
    if words.drafter is not None:
        settings["drafter"] = [models.open_exportable(words.drafter.model).fingerprint, list(words.drafter.tiers)]

    def build(folder: Path) -> None:
        out = folder / gguf_stages.FILES
        exports = gguf_stages.plan_files(
            model,
            words,
            imatrix=imatrix,
            curvature=None if slopes is None else slopes.folder / gguf_stages.CURVATURE,
            damages=None if slopes is None else slopes.folder / "damages.json",
            progress=job.progress,
        )
        if not job.force:
            others = sorted(job.result.folder.glob(f"gguf-*/{gguf_stages.FILES}"))
            gguf_stages.link_earlier(exports, out, [other for other in others if other != out])
        gguf_stages.write_files(exports, words, out, force=job.force, progress=job.progress)
        gguf_stages.save_facts(gguf_stages.written(exports, out, imatrix), folder)

    behind = (*parents, *(stage.key for stage in (importances, slopes) if stage is not None))
    return job.stage("gguf", "", {"model": model.fingerprint, "quantiser": load().identity, **settings}, behind, build)


def _measure(job: Job, words: Measure, files: Stage, found: Quantised) -> dict[str, KldResult]:
    """KLD of every model file against the recipe's base, in one pass of it."""
    paths = {one.stem: found.folder / one.parts[0] for one in found.files if one.role == gguf_stages.MODEL}
    if not paths:
        return {}
    corpus = stages.corpus_of(words, job.base)
    settings = words.model_dump(mode="json", exclude={"corpus", "max_mean_nats"})
    done = job.stage(
        "kld",
        "gguf",
        {"model": job.base.fingerprint, "corpus": corpus.hash, "candidates": list(paths), **settings},
        (files.key,),
        lambda folder: gguf_stages.kld(job.base, paths, corpus, words, folder, progress=job.progress),
    )
    return stages.measured(done.folder, [*([FLOOR] if words.floor else []), *paths])
