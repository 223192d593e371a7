"""The local heal from an observation's Gram matrices: no model runs, seconds instead of a pass over the corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.records import StatisticsIndex, load_gram, load_statistics_index
from gemcut.records.heal import HEAL_FILE, HealReport, LayerHeal, load_heal, save_heal
from gemcut.store import atomic_folder, fingerprint
from gemcut.stream.model import stored_dtype
from gemcut.stream.weights import DTYPE_NAMES, TORCH_DTYPES, WeightReader
from gemcut.surgery.heal.folder import finished, plan_fingerprint, request_of, save_healed, stack
from gemcut.surgery.heal.layer import fit_layer, safe_scale
from gemcut.surgery.heal.settings import HealSettings, Job, jobs_of, refuse_few_samples
from gemcut.surgery.heal.solve import Moments
from gemcut.surgery.heal.stream import layer_heal
from gemcut.surgery.heal.unseen import ClassSums
from gemcut.types import Plan

Progress = Callable[[int, int, str], None]
FITTED_HALF, HELD_OUT_HALF = 0, 1


def heal_stored(
    base: Checkpoint,
    plan: Plan,
    statistics: Path,
    out: Path,
    *,
    ridge: float = 1e-2,
    progress: Progress | None = None,
    force: bool = False,
) -> HealReport:
    """W'_K = W_K + W_P G_PK (G_KK + λI)⁻¹ for every layer with dropped heads, into the folder `out`.

    Fitted on the half of the observed questions with even numbers, held out is the other half. Each layer is healed as
    if it alone were cut.

    Args:
        statistics: a folder that `observe` wrote, of this very checkpoint.
        ridge: λ in units of tr(G_KK)/|K|.
    Raises:
        UsageError: no heads are dropped; too few tokens; the halves were not kept apart (wide layers); `out` holds
            something else, and not `force`.
        CheckpointError: the statistics are of another model, or damaged.
        QualityError: a layer cannot be solved.
    """
    if plan.kind != "heads":
        raise UsageError(
            "only a cut of heads can be healed from statistics", got=plan.kind, hint="heal with a corpus instead"
        )
    settings = HealSettings(method="local", ridges=(ridge,))
    index = load_statistics_index(statistics)
    if index.meta.model_fingerprint != base.fingerprint:
        raise CheckpointError(
            "the statistics are of another checkpoint",
            where=index.meta.model_name,
            got=index.meta.model_fingerprint[:12],
            wanted=base.fingerprint[:12],
        )
    jobs = jobs_of(base, plan)
    wanted = settings.identity(DTYPE_NAMES[stored_dtype(base)]) | {"statistics": index.fingerprint}
    digest = fingerprint(request_of(base, plan, {"statistics": index.fingerprint}, wanted))
    if finished(out, digest, force=force):
        return load_heal(out / HEAL_FILE)
    layers: list[LayerHeal] = []
    with atomic_folder(out, force=force) as folder:
        for job in jobs.values():
            weight, dtype = _tensor(base, job.tensor)
            scale = safe_scale(_tensor(base, job.norm)[0])
            fit = _half(job, weight * scale[:, None], statistics, index, FITTED_HALF)
            refuse_few_samples({job.layer: job}, fit.n, index.meta.tokens)
            held_out = _half(job, weight * scale[:, None], statistics, index, HELD_OUT_HALF)
            unseen = ClassSums(held_out, {})
            fitted = fit_layer(job, weight, dtype, fit=fit, inner=None, held_out=unseen, ridges=(ridge,), scale=scale)
            file = hashed = None
            if fitted.used:
                file, hashed = save_healed(folder, job.layer, job.tensor, fitted.weight)
            layers.append(layer_heal(job, fitted, (fit.n, held_out.n), file, hashed))
            if progress is not None:
                progress(len(layers), len(jobs), f"layer {job.layer}")
        report = HealReport(
            fingerprint=digest,
            method="local",
            model_fingerprint=base.fingerprint,
            model_name=base.name,
            plan_fingerprint=plan_fingerprint(plan),
            corpus_hash=index.meta.corpus_hash,
            template_hash=index.meta.template_hash,
            bos_policy=index.meta.bos_policy,
            settings=wanted,
            dtype=index.meta.dtype,
            items=len(index.meta.questions),
            held_out_items=len(index.meta.questions[HELD_OUT_HALF::2]),
            tokens=index.meta.tokens,
            layers=tuple(layers),
            stack=stack(),
        )
        save_heal(report, folder / HEAL_FILE)
    return report


def _tensor(base: Checkpoint, name: str) -> tuple[torch.Tensor, torch.dtype]:
    ref = base.ref(name)
    reader = WeightReader(base, torch.float64, torch.device("cpu"))
    return reader.read(name, tuple(ref.shape)), TORCH_DTYPES[ref.dtype]


def _half(job: Job, weight: torch.Tensor, statistics: Path, index: StatisticsIndex, half: int) -> Moments:
    gram = load_gram(statistics, index, job.layer, job.module, split=half, check_hash=half == FITTED_HALF)
    if gram.splits < 2:
        raise UsageError(
            "this layer's statistics keep no half apart, so that a heal could not be measured on unseen text",
            where=f"layer {job.layer}",
            hint="heal with a corpus (method local or sequential) instead",
        )
    if len(gram.g) != weight.shape[1]:
        raise CheckpointError(
            "the Gram matrix has another width than the projection",
            where=f"layer {job.layer}, {job.tensor}",
            got=len(gram.g),
            wanted=weight.shape[1],
        )
    return Moments.of_gram(torch.from_numpy(gram.g), weight, torch.from_numpy(job.columns), gram.n)
