"""Heal a cut layer by layer: two streams of hidden states, one of the dense model, one of the healed one.

For each layer with dropped heads, with the layer in memory once: the dense stream passes and gives the target, the cut
stream passes and gives the inputs X̂ that the layer will really have, the kept columns of o_proj are refitted, and the
cut stream passes again through the healed layer. So every layer is fitted to what the layers before it have become, and
makes up for what they lost. Of a cut of experts, the scales or the down_proj of those that stay are refitted: the same,
with the experts' sum for the target and what each kept expert adds to it, routed without the dropped ones, for X̂.

The folder that it writes:

heal.json               last of all; see `records.heal`
layer-NNN.safetensors   the healed projection or scales of layer NNN, with the base's name, shape and dtype, and with
                        zeros where units are dropped; only where the heal is used
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gemcut.checkpoint.read import Checkpoint
from gemcut.records.heal import HEAL_FILE, HealReport, LayerHeal, load_heal, save_heal
from gemcut.store import PARTIAL, atomic_folder, fingerprint, need_disk
from gemcut.stream.corpus import Corpus
from gemcut.stream.faults import refuse
from gemcut.stream.model import StreamedModel, stored_dtype
from gemcut.stream.weights import DTYPE_NAMES, TORCH_DTYPES, WeightReader
from gemcut.surgery.heal.down import DownRows, Inner, fit_down, refuse_few_routed, token_bytes
from gemcut.surgery.heal.folder import (
    Finished,
    finished,
    left_behind,
    plan_fingerprint,
    request_of,
    save_healed,
    stack,
    tidy,
)
from gemcut.surgery.heal.layer import Fitted, Sums, Tap
from gemcut.surgery.heal.routed import Contributions, ScaleSums, Target, dropped, recorded, router_scales
from gemcut.surgery.heal.settings import (
    FIT,
    HELD_OUT,
    HealSettings,
    Job,
    jobs_of,
    refuse_few_samples,
    split_items,
)
from gemcut.surgery.heal.states import Layout, StatesReader, StatesWriter, states_bytes, states_path
from gemcut.surgery.heal.unseen import row_bytes
from gemcut.types import Plan

log = logging.getLogger(__name__)

DENSE, CUT = "dense", "cut"
Progress = Callable[[int, int, str], None]


def heal(
    base: Checkpoint,
    plan: Plan,
    corpus: Corpus,
    out: Path,
    *,
    settings: HealSettings | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> HealReport:
    """Refit what stays of the output projections, or the scales of the experts that stay, into the folder `out`.

    A finished heal of the same model, plan, corpus and settings is returned at once; a killed one goes on behind its
    last finished layer. `progress` is called with (batches × layers done, in all, label).

    Raises:
        UsageError: nothing is dropped; too few items or tokens; `out` holds something else, and not `force`.
        MissingError: not enough disk.
        CheckpointError, QualityError: a value is not finite, or a layer cannot be solved: layer and item are named.
    """
    settings = settings or HealSettings()
    jobs = jobs_of(base, plan, heal_all=settings.heal_all, experts=settings.experts)
    part_of = split_items(corpus, settings)
    lengths = np.array([len(row.ids) for row in corpus.items], np.int64)
    held_out = int(lengths[part_of == HELD_OUT].sum())
    refuse_few_samples(jobs, corpus.tokens - held_out, corpus.tokens)
    if plan.kind == "experts" and settings.experts == "down_proj":
        refuse_few_routed(base, jobs.values(), corpus.tokens - held_out, corpus.tokens)
    source = {"corpus": corpus.hash, "template": corpus.template_hash, "bos": corpus.bos_policy}
    wanted = settings.identity(DTYPE_NAMES[stored_dtype(base)])
    digest = fingerprint(request_of(base, plan, {**source}, wanted))
    if finished(out, digest, force=force):
        log.info("%s is finished already: same model, plan, corpus and settings", out.name)
        return load_heal(out / HEAL_FILE)
    experts = "recording" if plan.kind == "experts" else None
    with StreamedModel.open(base, device=settings.device, dtype=settings.dtype, experts=experts) as model:
        layout = Layout.of(corpus.items, part_of, settings.batch_tokens, int(model.config.vocab_size))
        need_disk(out, _disk_bytes(model, layout, jobs))
        done = left_behind(out.with_name(out.name + PARTIAL), digest, force=force)
        with atomic_folder(out, force=force, keep_partial=True) as folder:
            _Pass(model, jobs, layout, settings, folder, digest, progress, done).run()
            tidy(folder, done.layers)
            report = HealReport(
                fingerprint=digest,
                method=settings.method,
                model_fingerprint=base.fingerprint,
                model_name=base.name,
                plan_fingerprint=plan_fingerprint(plan),
                corpus_hash=corpus.hash,
                template_hash=corpus.template_hash,
                bos_policy=corpus.bos_policy,
                settings=wanted,
                dtype=model.dtype_name,
                items=len(corpus.items),
                held_out_items=int((part_of == HELD_OUT).sum()),
                tokens=corpus.tokens,
                layers=tuple(done.layers),
                stack=stack(),
            )
            save_heal(report, folder / HEAL_FILE)
    return report


def _disk_bytes(model: StreamedModel, layout: Layout, jobs: dict[int, Job]) -> int:
    """Two streams at two boundaries, what is measured on, and the healed tensors."""
    healed = sum(model.checkpoint.ref(job.tensor).size_bytes for job in jobs.values())
    measured = sum(len(row.ids) for row, part in zip(layout.rows, layout.part_of, strict=True) if part != FIT)
    rows = measured * row_bytes(jobs.values(), model.hidden_size, model.dtype.itemsize)
    rows += sum(len(row.ids) for row in layout.rows) * token_bytes(
        model.checkpoint, jobs.values(), model.dtype.itemsize
    )
    return 4 * states_bytes(layout, model.hidden_size, model.dtype) + rows + healed


@dataclasses.dataclass
class _Pass:
    model: StreamedModel
    jobs: dict[int, Job]
    layout: Layout
    settings: HealSettings
    folder: Path
    digest: str
    progress: Progress | None
    done: Finished

    def run(self) -> None:
        """Every layer from the first that is not done; `done` grows."""
        done, last = self.done, max(self.jobs)
        if not done.embedded or not self._whole(done.next_layer):
            done.layers.clear()
            done.next_layer = 0
            self._embed()
            done.save(self.folder, self.digest)
        elif done.next_layer:
            log.info("going on with layer %d", done.next_layer)
        for i in range(done.next_layer, last + 1):  # behind the last job there is nothing to find out
            found = self._layer(i, last=i == last)
            if found is not None:
                done.layers.append(found)
            done.next_layer = i + 1
            # hidden states and tensor are there: now the word that they are
            done.save(self.folder, self.digest)
            for stream in (DENSE, CUT):
                states_path(self.folder, stream, i).unlink(missing_ok=True)

    def _parted(self) -> bool:
        """Whether the cut stream is another than the dense one by now."""
        cut = any(self.jobs[one.layer].cuts or one.used for one in self.done.layers)
        return cut and self.settings.method == "sequential"

    def _whole(self, boundary: int) -> bool:
        """Whether a killed pass left the hidden states that enter this layer."""
        if boundary > max(self.jobs):
            return True
        size = states_bytes(self.layout, self.model.hidden_size, self.model.dtype)
        paths = [
            states_path(self.folder, stream, boundary) for stream in ((DENSE, CUT) if self._parted() else (DENSE,))
        ]
        return all(path.is_file() and path.stat().st_size == size for path in paths)

    def _embed(self) -> None:
        with self._writer(DENSE, 0) as writer:
            for k in range(len(self.layout.batches)):
                writer.write(k, self.model.embed(self.layout.ids(k)))
            writer.commit()

    @contextlib.contextmanager
    def _writer(self, stream: str, boundary: int) -> Iterator[StatesWriter]:
        writer = StatesWriter(states_path(self.folder, stream, boundary), self.layout)
        try:
            yield writer
        finally:
            writer.close()

    @contextlib.contextmanager
    def _reader(self, stream: str, boundary: int) -> Iterator[StatesReader]:
        path = states_path(self.folder, stream, boundary)
        reader = StatesReader(path, self.layout, self.model.hidden_size, self.model.dtype)
        try:
            yield reader
        finally:
            reader.close()

    # ------------------------------------------------------------ one layer

    def _layer(self, i: int, *, last: bool) -> LayerHeal | None:
        """Both streams through one layer; what was found, and the hidden states behind it, are on disk on return."""
        model, job = self.model, self.jobs.get(i)
        parted = self._parted()
        if job is not None and not (job.cuts or parted):
            job = None  # nothing before it has changed: there is nothing to refit
        with contextlib.ExitStack() as stack_, model.layer(i) as module:
            model.prefetch(i + 1)
            dense = stack_.enter_context(self._reader(DENSE, i))
            cut = stack_.enter_context(self._reader(CUT, i)) if parted else dense
            dense_out = None if last else stack_.enter_context(self._writer(DENSE, i + 1))
            cuts_apart = self.settings.method == "sequential" and (parted or job is not None)
            cut_out = None if last or not cuts_apart else stack_.enter_context(self._writer(CUT, i + 1))
            fitted = None
            if job is None:
                self._carry(i, module, dense, dense_out)
                self._carry(i, module, cut, cut_out)
            else:
                fit = {"heads": self._fit, "scales": self._fit_scales, "down_proj": self._fit_down}[job.kind]
                fitted = fit(job, module, dense, cut if parted else None, dense_out)
                with _healed(job, module, fitted.weight):
                    self._carry(i, module, cut, cut_out)
            for writer in (dense_out, cut_out):
                if writer is not None:
                    writer.commit()
        self._say(i, len(self.layout.batches))
        return None if job is None or fitted is None else self._record(job, fitted)

    def _run(self, i: int, module: nn.Module, k: int, hidden: torch.Tensor) -> torch.Tensor:
        out = self.model.run_layer(module, hidden.to(self.model.device))
        self._check(i, module, k, "a layer's output", out.reshape(-1, out.shape[-1]))
        return out

    def _carry(self, i: int, module: nn.Module, source: StatesReader, target: StatesWriter | None) -> None:
        """One stream through the layer as it stands."""
        if target is None:
            return
        for k in range(len(self.layout.batches)):
            target.write(k, self._run(i, module, k, source.read(k)))

    def _fit(
        self, job: Job, module: nn.Module, dense: StatesReader, cut: StatesReader | None, dense_out: StatesWriter | None
    ) -> Fitted:
        """The dense stream passes; X̂ and Y of every batch are added up and the kept columns are refitted."""
        model, i = self.model, job.layer
        ref = model.checkpoint.ref(job.tensor)
        eps, gamma = float(model.config.rms_norm_eps), self._stored(job.norm)
        with (
            Sums(job, ref.shape[0], self.layout, eps, gamma, model.device, self.folder) as sums,
            Tap(module.get_submodule(job.module)) as tap,
        ):
            for k in range(len(self.layout.batches)):
                hidden, drift, uncut = dense.read(k), None, None
                out = self._run(i, module, k, hidden)
                x, y = tap.take()
                if dense_out is not None:
                    dense_out.write(k, out)
                del out
                self._check(i, module, k, f"the output of {job.module}", y)
                if cut is not None:
                    drifted = cut.read(k)
                    if self.settings.target == "stream":
                        drift = (hidden.double() - drifted.double()).flatten(0, 1)
                    self._run(i, module, k, drifted)
                    x, uncut = tap.take()
                self._check(i, module, k, f"the input of {job.module}", x)
                sums.add(k, x, y, drift, uncut)
                self._say(i, k)
            return sums.finish(job, self._stored(job.tensor), TORCH_DTYPES[ref.dtype], self.settings)

    def _fit_scales(
        self, job: Job, module: nn.Module, dense: StatesReader, cut: StatesReader | None, dense_out: StatesWriter | None
    ) -> Fitted:
        """The dense stream passes, then the cut one with the cut router; φ and Y of every batch are added up and the
        scales of the kept experts are refitted."""
        model, i = self.model, job.layer
        sums = ScaleSums(job, self.layout, float(model.config.rms_norm_eps), model.device)
        for k in range(len(self.layout.batches)):
            hidden, target, seen = dense.read(k), Target(), Contributions()
            with recorded(module, target):
                out = self._run(i, module, k, hidden)
            if dense_out is not None:
                dense_out.write(k, out)
            with dropped(job, module), recorded(module, seen):
                self._run(i, module, k, hidden if cut is None else cut.read(k))
            self._check(i, module, k, "the experts' summed output", target.y)
            self._check(i, module, k, "an expert's output", seen.phi.flatten(1))
            sums.add(k, seen, target.y)
            self._say(i, k)
        return sums.finish(
            job, self._stored(job.tensor), TORCH_DTYPES[model.checkpoint.ref(job.tensor).dtype], self.settings
        )

    def _fit_down(
        self, job: Job, module: nn.Module, dense: StatesReader, cut: StatesReader | None, dense_out: StatesWriter | None
    ) -> Fitted:
        """As `_fit_scales`, of what enters each kept expert's down_proj."""
        model, i, ref = self.model, job.layer, self.model.checkpoint.ref(job.tensor)
        top_k, eps = model.checkpoint.family.top_k(model.checkpoint.text_config), float(model.config.rms_norm_eps)
        scales = router_scales(module)
        rows = DownRows(self.layout, top_k, ref.shape[1], ref.shape[2], model.dtype, eps, self.folder)
        for k in range(len(self.layout.batches)):
            hidden, target, seen = dense.read(k), Target(), Inner()
            with recorded(module, target):
                out = self._run(i, module, k, hidden)
            if dense_out is not None:
                dense_out.write(k, out)
            with dropped(job, module, scales), recorded(module, seen):
                self._run(i, module, k, hidden if cut is None else cut.read(k))
            self._check(i, module, k, "the experts' summed output", target.y)
            rows.add(k, seen, target.y)
            self._say(i, k)
        weight = WeightReader(model.checkpoint, TORCH_DTYPES[ref.dtype], torch.device("cpu"))
        return fit_down(job, rows, weight.read(job.tensor, tuple(ref.shape)), self.settings.ridges)

    def _stored(self, name: str) -> torch.Tensor:
        """The base's own tensor, float64."""
        reader = WeightReader(self.model.checkpoint, torch.float64, torch.device("cpu"))
        return reader.read(name, tuple(self.model.checkpoint.ref(name).shape))

    def _record(self, job: Job, fitted: Fitted) -> LayerHeal:
        file = digest = None
        if fitted.used:
            file, digest = save_healed(self.folder, job.layer, job.tensor, fitted.weight)
        else:
            log.warning("layer %d: the heal does not beat the cut alone on held-out text and is not used", job.layer)
        lengths = np.array([len(row.ids) for row in self.layout.rows], np.int64)
        held_out = int(lengths[self.layout.part_of == HELD_OUT].sum())
        return layer_heal(job, fitted, (int(lengths.sum()) - held_out, held_out), file, digest)

    def _say(self, i: int, k: int) -> None:
        if self.progress is not None:
            batches = len(self.layout.batches)
            self.progress(i * batches + k, (max(self.jobs) + 1) * batches, f"layer {i}")

    def _check(self, i: int, module: nn.Module, k: int, what: str, rows: torch.Tensor) -> None:
        """Refuse a value that is not finite. rows [B·S, F]: padding repeats a real token and is checked with it."""
        bad = ~torch.isfinite(rows).all(-1)
        if bool(bad.any()):
            place = self.layout.name_position(k, int(torch.argmax(bad.to(torch.int8))))
            refuse(module, i, what, f"{self.model.checkpoint.name}, layer {i}, {place}")


@contextlib.contextmanager
def _healed(job: Job, module: nn.Module, weight: torch.Tensor) -> Iterator[None]:
    """The layer as it will be, in memory; the base's file is only ever read."""
    if job.kind == "scales":
        with dropped(job, module, weight):
            yield
        return
    if job.kind == "down_proj":
        with torch.no_grad():
            module.get_submodule(job.module).get_parameter("down_proj").copy_(weight)
        with dropped(job, module, router_scales(module)):
            yield
        return
    with torch.no_grad():
        linear = module.get_submodule(job.module)
        assert isinstance(linear.weight, nn.Parameter)
        linear.weight.copy_(weight)
    yield


def layer_heal(job: Job, fitted: Fitted, samples: tuple[int, int], file: str | None, digest: str | None) -> LayerHeal:
    """The record of one layer; samples = (fitted on, held out)."""
    found = {f.name: getattr(fitted, f.name) for f in dataclasses.fields(fitted) if f.name != "weight"}
    return LayerHeal(
        layer=job.layer,
        tensor=job.tensor,
        units=job.units,
        head_dim=job.head_dim,
        kept=job.kept,
        samples=samples[0],
        held_out_samples=samples[1],
        file=file,
        blake3=digest,
        **found,
    )
