"""Leave one head out: the loss that it costs, for every head, in one streamed pass.

A variant is the model without one head. It is born at that head's layer from the unchanged model's states, and goes
through the later layers together with all other variants, so that a layer is read once for all of them. Where the
states of all variants do not fit, the heads take turns in rounds; the unchanged model waits where the next round
begins, so that no round reads a layer below its first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gemcut.ablate.gates import Heads, heads_of, layer_count, silenced
from gemcut.ablate.passage import Passage, lay_out, loss_head, room, slab_bytes
from gemcut.ablate.settings import DEFAULTS, AblateSettings
from gemcut.ablate.summary import summarise
from gemcut.checkpoint.read import Checkpoint
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import StreamedModel
from gemcut.types import HeadImportance

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class LooSize:
    """What `loo` would take.

    slab_bytes: one model's states of the whole corpus.   state_bytes: what lies in memory or on disk at once.
    all_bytes: the same if everything ran in one round.   layer_loads: decoder layers read.
    passes: how often the whole corpus goes through a layer.
    """

    slab_bytes: int
    variants: int
    state_bytes: int
    all_bytes: int
    rounds: int
    layer_loads: int
    passes: int


@dataclass(frozen=True, slots=True)
class _Variant:
    """The model without `head` of `heads.layer`; `row` is the layer's row in the result."""

    heads: Heads
    row: int
    head: int

    @property
    def layer(self) -> int:
        return self.heads.layer


def loo_bytes(checkpoint: Checkpoint, corpus: Corpus, settings: AblateSettings = DEFAULTS) -> LooSize:
    """Bytes, rounds and work of `loo` with the same arguments; reads headers only.

    Raises:
        MissingError: not even one variant fits beside the unchanged model.
    """
    passage = lay_out(checkpoint, corpus, settings.batch_tokens)
    size = slab_bytes(checkpoint, passage, settings.dtype)
    variants = _variants(heads_of(checkpoint, settings.layers))
    _, count = room(settings, size, len(variants) + 1, least=2)
    groups = _rounds(variants, count - 1)
    depth = layer_count(checkpoint)
    return LooSize(
        slab_bytes=size,
        variants=len(variants),
        state_bytes=count * size,
        all_bytes=(len(variants) + 1) * size,
        rounds=len(groups),
        layer_loads=depth + sum(depth - group[0].layer for group in groups[1:]),
        passes=_passes(variants, depth),
    )


def loo(
    checkpoint: Checkpoint,
    corpus: Corpus,
    settings: AblateSettings = DEFAULTS,
    *,
    progress: Progress | None = None,
) -> HeadImportance:
    """ΔNLL of leaving each head out: what the loss rises by when the head's output is zero.

        values[l, h] = (1/T) Σ_t (nll_t(without head h of layer l) − nll_t(model)),   nats per predicted token

    T counts every token but the first of each item (the BOS); padding is no token. Negative: the loss falls. Per class
    the same over its tokens; standard errors over items (`summary.ratio`). The zero is written into o_proj's input:
    what the layers below and beside compute is shared with the unchanged model, so that a head whose o_proj columns
    are zero has exactly 0. Layers in `dtype`; final norm and head in float32, softmax and sums in float64.

    Args:
        progress: called with (passes of the corpus through a layer, in all, label).
    Raises:
        UsageError: a layer that is not there; an empty corpus; a model that cannot be streamed.
        MissingError: no room for two states of the corpus.
        CheckpointError: another tokenizer; a weight that is not finite (names the layer).
        QualityError: a state or a loss is not finite.
    Source:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019 (§3.2).
    """
    passage = lay_out(checkpoint, corpus, settings.batch_tokens)
    heads = heads_of(checkpoint, settings.layers)
    variants = _variants(heads)
    size = slab_bytes(checkpoint, passage, settings.dtype)
    slabs, count = room(settings, size, len(variants) + 1, least=2)
    groups = _rounds(variants, count - 1)
    if len(groups) > 1:
        log.info("%d heads in %d rounds of %d: the budget holds no more", len(variants), len(groups), count - 1)
    losses = np.zeros((len(corpus.items), len(heads), variants[0].heads.count))
    # the recording experts have eager's bits and need no kernel per shape in 16 bits
    with StreamedModel.open(checkpoint, device=settings.device, dtype=settings.dtype, experts="recording") as model:
        made = [slabs.make(passage.positions, model.hidden_size, model.dtype) for _ in range(count)]
        run = _Run(model, passage, made[0], made[1:], progress, _passes(variants, model.n_layers))
        passage.embed(model, run.base)
        for i, group in enumerate(groups):
            last = i + 1 == len(groups)
            run.round(group, until=model.n_layers if last else groups[i + 1][0].layer)
            with loss_head(model) as head:
                for variant, slab in zip(group, run.pool, strict=False):
                    losses[:, variant.row, variant.head] = passage.losses(head, slab)
                if last:
                    losses -= passage.losses(head, run.base)[:, None, None]
        computed = model.dtype_name
    weights = passage.scored.astype(np.float64)
    return summarise("loo", checkpoint, corpus, dtype=computed, layers=list(heads), sums=losses, weights=weights)


class _Run:
    """The unchanged model's states, a pool for the variants' states, and how far the unchanged model has come."""

    def __init__(
        self,
        model: StreamedModel,
        passage: Passage,
        base: torch.Tensor,
        pool: list[torch.Tensor],
        progress: Progress | None,
        total: int,
    ) -> None:
        self.model, self.passage, self.base, self.pool, self.progress = model, passage, base, pool, progress
        self.at = 0  # the layer that `base` enters next
        self.done, self.total = 0, total

    def round(self, group: Sequence[_Variant], *, until: int) -> None:
        """One group to the top; the unchanged model stops before layer `until`."""
        for i in range(self.at, self.model.n_layers):
            with self.model.layer(i) as module:
                self.model.prefetch(i + 1)
                for variant, slab in zip(group, self.pool, strict=False):
                    who = f"without head {variant.head} of layer {variant.layer}"
                    if variant.layer < i:
                        self.passage.through(self.model, module, i, (slab, slab), who)
                    elif variant.layer == i:
                        with silenced(module, variant.heads, variant.head):
                            self.passage.through(self.model, module, i, (self.base, slab), who)
                    else:
                        break  # born later, as all behind it
                    self._count(i)
                if i < until:
                    self.passage.through(self.model, module, i, (self.base, self.base), "nothing left out")
                    self._count(i)
        self.at = until

    def _count(self, layer: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, f"layer {layer}")


def _variants(heads: dict[int, Heads]) -> list[_Variant]:
    return [_Variant(one, row, head) for row, one in enumerate(heads.values()) for head in range(one.count)]


def _rounds(variants: Sequence[_Variant], size: int) -> list[Sequence[_Variant]]:
    return [variants[i : i + size] for i in range(0, len(variants), size)]


def _passes(variants: Sequence[_Variant], depth: int) -> int:
    return depth + sum(depth - variant.layer for variant in variants)
