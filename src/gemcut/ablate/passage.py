"""A corpus laid out once for many passes: which items run together, and their losses at the top."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gemcut.ablate.settings import AblateSettings
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, MissingError, QualityError, UsageError
from gemcut.machine import available_bytes
from gemcut.store import free_bytes
from gemcut.stream.corpus import Corpus, Row, check_tokenizer
from gemcut.stream.faults import refuse
from gemcut.stream.hidden import Batch, Slabs, make_batches, not_finite, padded_ids, rows_per_tile
from gemcut.stream.model import StreamedModel, stored_dtype
from gemcut.stream.weights import named_dtype
from gemcut.types import F64, I64


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """Items in batches of similar length, right padded. A slab [positions, H] holds one state of all of them.

    edges: where each batch begins in a slab.   scored: int64 [Q], predicted tokens of each item (all but its first).
    """

    rows: tuple[Row, ...]
    batches: tuple[Batch, ...]
    edges: tuple[int, ...]
    scored: I64

    @property
    def positions(self) -> int:
        return self.edges[-1]

    def views(self, slab: torch.Tensor) -> list[torch.Tensor]:
        """[B, S, H] of every batch, in the slab's own memory."""
        return [
            slab[self.edges[i] : self.edges[i + 1]].view(len(b.rows), b.length, slab.shape[1])
            for i, b in enumerate(self.batches)
        ]

    def embed(self, model: StreamedModel, slab: torch.Tensor) -> None:
        """What enters the first layer."""
        for batch, view in zip(self.batches, self.views(slab), strict=True):
            out = model.embed(padded_ids(self.rows, batch))
            if (where := not_finite(self.rows, batch, out)) is not None:
                raise QualityError("an embedding is not finite", where=f"{model.checkpoint.name}, {where}")
            view.copy_(out)

    def through(
        self, model: StreamedModel, module: nn.Module, layer: int, slabs: tuple[torch.Tensor, torch.Tensor], who: str
    ) -> None:
        """All items of the first slab through a decoder layer into the second (which may be the first).

        Raises:
            CheckpointError: a state is not finite, and a weight of the layer is to blame.
            QualityError: a state is not finite.
        """
        for batch, source, target in zip(self.batches, self.views(slabs[0]), self.views(slabs[1]), strict=True):
            out = model.run_layer(module, source.to(model.device))
            if (where := not_finite(self.rows, batch, out)) is not None:
                refuse(module, layer, "a layer's output", f"layer {layer}, {who}, {where}")
            target.copy_(out)

    def losses(self, head: StreamedModel, slab: torch.Tensor) -> F64:
        """Σ −ln p(next token) of every item, float64 [Q], in nats, from the last layer's output.

        Float32 logits, float64 softmax and sums. Tiles are the same for every slab: equal states give equal bits.
        """
        out = np.zeros(len(self.rows))
        for batch, view in zip(self.batches, self.views(slab), strict=True):
            states, target = self._scored(batch, view)
            parts = []
            for at in _tiles(len(states), int(head.config.vocab_size)):
                logits = head.head(states[at].to(head.device, torch.float32))
                parts.append(_nll(logits, target[at].to(head.device)).cpu())
            self._add(out, batch, torch.cat(parts).numpy())
        self._refuse_losses(head, out)
        return out

    def gradients(self, head: StreamedModel, slab: torch.Tensor) -> F64:
        """`losses`, and the slab's states are replaced by ∂(Σ loss)/∂state: zero where nothing is predicted."""
        out = np.zeros(len(self.rows))
        for batch, view in zip(self.batches, self.views(slab), strict=True):
            states, target = self._scored(batch, view)
            gradient, parts = torch.zeros_like(states), []
            for at in _tiles(len(states), int(head.config.vocab_size)):
                tile = states[at].to(head.device, torch.float32).requires_grad_()
                nll = _nll(head.head_with_grad(tile), target[at].to(head.device))
                gradient[at] = torch.autograd.grad(nll.sum(), tile)[0].to("cpu", gradient.dtype)
                parts.append(nll.detach().cpu())
            self._add(out, batch, torch.cat(parts).numpy())
            view.zero_()
            first = 0
            for row, item in enumerate(batch.rows):
                view[row, : int(self.scored[item])] = gradient[first : (first := first + int(self.scored[item]))]
        self._refuse_losses(head, out)
        return out

    def _scored(self, batch: Batch, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States [n, H] of the batch's positions with a next token, a copy, and those tokens [n]."""
        states = torch.cat([view[row, : int(self.scored[item])] for row, item in enumerate(batch.rows)])
        return states, torch.from_numpy(np.concatenate([self.rows[item].ids[1:] for item in batch.rows]))

    def _add(self, out: F64, batch: Batch, nll: F64) -> None:
        first = 0
        for item in batch.rows:
            out[item] = nll[first : (first := first + int(self.scored[item]))].sum()

    def _refuse_losses(self, head: StreamedModel, losses: F64) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise QualityError(
                "a loss is not finite",
                where=f"{head.checkpoint.name}, final norm or head, item {self.rows[int(bad[0])].id!r}",
                hint="look for the broken tensor with gemcut diff",
            )


def lay_out(checkpoint: Checkpoint, corpus: Corpus, batch_tokens: int) -> Passage:
    """Batches of a corpus that this model's tokenizer made.

    Raises:
        UsageError: the corpus is empty, or batch_tokens is below one.
        CheckpointError: another tokenizer made the token ids.
    """
    if not corpus.items:
        raise UsageError("the corpus has no items")
    if batch_tokens < 1:
        raise UsageError("batch_tokens is too small", got=batch_tokens, wanted="at least 1")
    check_tokenizer(checkpoint.path, checkpoint.name, corpus)
    batches = make_batches([len(row.ids) for row in corpus.items], batch_tokens)
    edges = np.concatenate([[0], np.cumsum([b.positions for b in batches])]).tolist()
    scored = np.array([len(row.ids) - 1 for row in corpus.items], dtype=np.int64)
    return Passage(corpus.items, tuple(batches), tuple(edges), scored)


def slab_bytes(checkpoint: Checkpoint, passage: Passage, dtype: str | None) -> int:
    """One state of the whole corpus between two layers, padding included."""
    hidden = checkpoint.text_config.get("hidden_size")
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise CheckpointError("config.json has no usable hidden_size", where=checkpoint.name, got=repr(hidden)[:60])
    compute = stored_dtype(checkpoint) if dtype is None else named_dtype(dtype)
    return passage.positions * hidden * compute.itemsize


def room(settings: AblateSettings, size_bytes: int, wanted: int, least: int) -> tuple[Slabs, int]:
    """The maker of slabs, and how many of `wanted` there is room for: in memory first, then in nameless files.

    Raises:
        MissingError: there is no room for `least`.
    """
    memory = available_bytes() // 4 if settings.memory_bytes is None else settings.memory_bytes
    slabs = Slabs(memory, settings.scratch)
    disk = free_bytes(slabs.scratch) // 2 if settings.max_bytes is None else settings.max_bytes
    count = memory // size_bytes + disk // size_bytes
    if count < least:
        raise MissingError(
            "there is no room for the hidden states",
            got=f"{memory} bytes of memory, {disk} bytes of disk",
            wanted=f"{least * size_bytes} bytes: {least} states of the whole corpus",
            hint="raise max_bytes, take fewer tokens (max_tokens), or fewer layers",
        )
    return slabs, min(count, wanted)


@contextlib.contextmanager
def loss_head(model: StreamedModel) -> Iterator[StreamedModel]:
    """The model's norm, head and soft cap in float32: 16-bit logits are coarser than what one head changes."""
    if model.dtype == torch.float32:
        yield model
        return
    with StreamedModel.open(model.checkpoint, device=str(model.device), dtype="float32") as head:
        yield head


def _tiles(rows: int, vocabulary: int) -> Iterator[slice]:
    step = rows_per_tile(vocabulary)
    return (slice(at, at + step) for at in range(0, rows, step))


def _nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """−ln softmax(logits)[target], float64 [T], from logits [T, V]."""
    wide = logits.double()
    return torch.logsumexp(wide, -1) - wide.gather(-1, target[:, None]).squeeze(-1)
