"""One streamed pass over a corpus: every statistic at once, resumable, never recomputed.

The folder that it writes:

statistics.json         last of all; see `records.statistics`
observation.json        what was asked for: settings, corpus, inputs that linear layers share
layer-NNN.safetensors   written as layer NNN finishes; C classes, Q questions, E experts, S = 2 halves of the corpus
    experts.by_class.<sum>     F64 [C, E]     EXPERT_SUMS and EXPERT_MAXIMA of `types`
    experts.by_question.<sum>  F32 [Q, E]     QUESTION_SUMS
    near.<sum>                                see `observe.near`
    linear.<module>.<sum>      F64            see `observe.columns`; n [S], a1, a2, a4 [S, F], amax [F] (F32); of the
                                              fused experts n [S, E], a1, a2, a4 [S, E, F], amax [E, F]
    cache.{k,v}.amax           F32 [KV heads]   see `observe.cache`
    gram.<module>.<sum>        F64            see `observe.gram`; g [S or 1, d, d], x [S or 1, d], w and n [S or 1]
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemcut.checkpoint.read import Checkpoint
from gemcut.observe.batches import Layout, lay_out
from gemcut.observe.folder import (
    REQUEST_FILE,
    Finished,
    finished,
    left_behind,
    meta_of,
    request_of,
    save_layer,
)
from gemcut.observe.hidden import HiddenReader, HiddenWriter, hidden_path
from gemcut.observe.layer import LayerObserver
from gemcut.observe.memory import observe_disk_bytes, observe_memory_bytes, refuse_memory
from gemcut.observe.settings import ObserveSettings
from gemcut.records.statistics import save_statistics_index
from gemcut.store import PARTIAL, atomic_folder, fingerprint, need_disk, write_json
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import StreamedModel, refuse_packed

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]


def observe(
    checkpoint: Checkpoint,
    corpus: Corpus,
    out: Path,
    *,
    settings: ObserveSettings | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Observe a checkpoint on a corpus into the folder `out`; returns it.

    A finished observation of the same model, corpus and settings is returned at once. A killed one goes on behind its
    last finished layer. `progress` is called with (tokens × layers done, in all, label).

    Raises:
        UsageError: `out` holds something else, and not `force`; an empty corpus; a model that cannot be streamed, or
            that is NVFP4.
        MissingError: memory or disk does not suffice.
        CheckpointError, QualityError: a value is not finite: layer, expert, item and token are named.
    """
    refuse_packed(checkpoint)
    settings = settings or ObserveSettings()
    request = request_of(checkpoint, corpus, settings)
    digest = fingerprint(request)
    if finished(out, digest, force=force):
        log.info("%s is finished already: same model, corpus and settings", out.name)
        return out
    longest = max((len(row.ids) for row in corpus.items), default=0)
    refuse_memory(settings, observe_memory_bytes(checkpoint, settings, longest=longest))
    with StreamedModel.open(checkpoint, device=settings.device, dtype=settings.dtype, experts="recording") as model:
        layout = lay_out(corpus, settings.batch_tokens, int(model.config.vocab_size))
        need_disk(out, observe_disk_bytes(checkpoint, settings, tokens=layout.tokens, questions=len(corpus.items)))
        done = left_behind(out.with_name(out.name + PARTIAL), digest, force=force)
        with atomic_folder(out, force=force, keep_partial=True) as folder:
            _Pass(model, layout, settings, folder, digest, progress).run(done)
            kept = {one.file for one in done.layers}
            for stray in folder.iterdir():  # hidden states, and what killed writes left, safetensors' own among them
                if stray.name not in kept:
                    stray.unlink()
            write_json(folder / REQUEST_FILE, {"schema": 1, "fingerprint": digest, **request, "aliases": done.aliases})
            save_statistics_index(folder, meta_of(checkpoint, corpus, model.dtype_name), done.layers)
    return out


@dataclass
class _Pass:
    model: StreamedModel
    layout: Layout
    settings: ObserveSettings
    folder: Path
    digest: str
    progress: Progress | None

    def run(self, done: Finished) -> None:
        """Every layer from the first that is not done; `done` grows."""
        first = len(done.layers)
        if not done.embedded or (first < self.model.n_layers and not hidden_path(self.folder, first).is_file()):
            done.layers.clear()
            self._embed()
            done.embedded = True
            done.save(self.folder, self.digest)
        elif first:
            log.info("going on with layer %d of %d", first, self.model.n_layers)
        for i in range(len(done.layers), self.model.n_layers):
            # hidden states first, then the sums, then the word that both are there
            observer = self.layer(i)
            done.aliases.update(observer.aliases)
            done.layers.append(save_layer(self.folder, i, observer.tensors(), observer.aliases))
            del observer  # its sums are as large as a third of a layer: they must not be there beside the next
            done.save(self.folder, self.digest)
            hidden_path(self.folder, i).unlink(missing_ok=True)

    def _embed(self) -> None:
        writer = HiddenWriter(hidden_path(self.folder, 0))
        try:
            for batch in self.layout.batches:
                writer.write(batch, self.model.embed(self.layout.ids(batch)))
            writer.commit()
        finally:
            writer.close()

    def layer(self, i: int) -> LayerObserver:
        """The whole corpus through one layer; its output is on disk and its weights are freed on return."""
        model, last = self.model, i + 1 == self.model.n_layers
        reader = HiddenReader(hidden_path(self.folder, i), self.layout.tokens, model.hidden_size, model.dtype)
        writer = None if last else HiddenWriter(hidden_path(self.folder, i + 1))
        eps = float(model.config.rms_norm_eps)
        tokens = i * self.layout.tokens
        try:
            with model.layer(i) as module:
                model.prefetch(i + 1)
                with LayerObserver(i, module, self.layout, self.settings, eps, model.device) as observer:
                    for batch in self.layout.batches:
                        observer.start(batch)
                        hidden = model.run_layer(module, reader.read(batch).to(model.device))
                        observer.finish(hidden)
                        if writer is not None:
                            writer.write(batch, hidden)
                        tokens += sum(batch.lengths)
                        if self.progress is not None:
                            self.progress(tokens, self.layout.tokens * model.n_layers, f"layer {i}")
                observer.check()  # while the weights are there to be blamed
            if writer is not None:
                writer.commit()
        finally:
            reader.close()
            if writer is not None:
                writer.close()
        return observer
