"""How steeply the loss falls with each head's share: gradients, backward through one layer at a time.

The pass forward keeps what enters every layer. Then, from the top: the loss's gradient arrives at a layer's output,
the layer is read again and run again with autograd, and gives the gradient of each head's factor and what goes on to
the layer below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from gemcut.ablate.gates import Gate, Heads, gated, heads_of, layer_count
from gemcut.ablate.passage import Passage, lay_out, loss_head, room, slab_bytes
from gemcut.ablate.settings import DEFAULTS, AblateSettings
from gemcut.ablate.summary import summarise
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import QualityError
from gemcut.stream.corpus import Corpus
from gemcut.stream.hidden import Slabs
from gemcut.stream.model import StreamedModel
from gemcut.types import F64, HeadImportance

Progress = Callable[[int, int, str], None]


def taylor_bytes(checkpoint: Checkpoint, corpus: Corpus, settings: AblateSettings = DEFAULTS) -> int:
    """Hidden states that `taylor` keeps at once, in memory or on disk: one state of the corpus for each layer from the
    lowest on, and the gradient."""
    size = slab_bytes(checkpoint, lay_out(checkpoint, corpus, settings.batch_tokens), settings.dtype)
    return size * (layer_count(checkpoint) - min(heads_of(checkpoint, settings.layers)) + 1)


def taylor(
    checkpoint: Checkpoint,
    corpus: Corpus,
    settings: AblateSettings = DEFAULTS,
    *,
    progress: Progress | None = None,
) -> HeadImportance:
    """First-order importance: the gradient of the loss with respect to a factor on each head's output.

        values[l, h] = (1/Q) Σ_q |∂ NLL_q / ∂α[l, h]|  at α = 1,   nats per predicted token

    NLL_q is the mean loss of item q over its predicted tokens (not the BOS, no padding); α[l, h] multiplies head h's
    columns of o_proj's input. The absolute value is taken per item, so that items which pull apart do not cancel. Per
    class the same over its items; standard errors over items. A head whose o_proj columns are zero has exactly 0.
    Layers in `dtype`, α's gradients summed in float32; final norm and head in float32, softmax and means in float64.
    Layers from the lowest on are read twice, those below it once.

    Args:
        progress: called with (layers forward and backward, in all, label).
    Raises:
        UsageError: a layer that is not there; an empty corpus; a model that cannot be streamed.
        MissingError: no room for the hidden states.
        CheckpointError: another tokenizer; a weight that is not finite (names the layer).
        QualityError: a state, a loss or a gradient is not finite.
    Source:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019 (§4.1), without their per-layer
        normalisation.
    """
    passage = lay_out(checkpoint, corpus, settings.batch_tokens)
    heads = heads_of(checkpoint, settings.layers)
    size = slab_bytes(checkpoint, passage, settings.dtype)
    needed = taylor_bytes(checkpoint, corpus, settings) // size
    slabs, _ = room(settings, size, needed, least=needed)
    with StreamedModel.open(checkpoint, device=settings.device, dtype=settings.dtype, experts="recording") as model:
        run = _Run(model, passage, heads, slabs, progress)
        top = run.forward()
        with loss_head(model) as head:
            passage.gradients(head, top)
        sums = run.backward(top)
        computed = model.dtype_name
    weights = np.ones(len(corpus.items))
    return summarise("taylor", checkpoint, corpus, dtype=computed, layers=list(heads), sums=sums, weights=weights)


class _Run:
    """What enters every layer from the lowest on, and the gradients that come back."""

    def __init__(
        self,
        model: StreamedModel,
        passage: Passage,
        heads: dict[int, Heads],
        slabs: Slabs,
        progress: Progress | None,
    ) -> None:
        self.model, self.passage, self.heads, self.slabs, self.progress = model, passage, heads, slabs, progress
        self.lowest = min(heads)
        self.entered: dict[int, torch.Tensor] = {}
        self.done = 0

    def forward(self) -> torch.Tensor:
        """The last layer's output; `entered` is filled."""
        now = self._slab()
        self.passage.embed(self.model, now)
        for i in range(self.model.n_layers):
            before = now
            if i >= self.lowest:
                self.entered[i] = before
                now = self._slab()
            with self.model.layer(i) as module:
                self.model.prefetch(i + 1)
                self.passage.through(self.model, module, i, (before, now), "forward")
            self._count(f"layer {i} forward")
        return now

    def backward(self, gradient: torch.Tensor) -> F64:
        """|∂ NLL_q / ∂α| float64 [Q, L, U]. `gradient` holds ∂(Σ loss)/∂(the last layer's output), and is used up."""
        units = next(iter(self.heads.values())).count
        out = np.zeros((len(self.passage.rows), len(self.heads), units))
        rows = {layer: row for row, layer in enumerate(self.heads)}
        for i in reversed(range(self.lowest, self.model.n_layers)):
            entered = self.entered.pop(i)
            with contextlib.ExitStack() as stack:
                module = stack.enter_context(self.model.layer(i))
                if i > self.lowest:
                    self.model.prefetch(i - 1)
                gate = stack.enter_context(gated(module, self.heads[i])) if i in rows else None
                found = self._layer(i, module, gate, entered, gradient)
            if found is not None:
                out[:, rows[i]] = found
            self.slabs.release(entered)
            self._count(f"layer {i} backward")
        return out

    def _layer(
        self, i: int, module: nn.Module, gate: Gate | None, entered: torch.Tensor, gradient: torch.Tensor
    ) -> F64 | None:
        """One layer's vector-Jacobian products: `gradient` moves from its output to its input; |∂NLL/∂α| [Q, U]."""
        out = None if gate is None else np.zeros((len(self.passage.rows), gate.heads.count))
        device, views = self.model.device, self.passage.views
        for batch, below, above in zip(self.passage.batches, views(entered), views(gradient), strict=True):
            x = below.to(device).detach().requires_grad_(i > self.lowest)
            wanted = [x] if i > self.lowest else []
            if gate is not None:
                wanted.append(gate.open(len(batch.rows), device))
            y = self.model.run_layer_with_grad(module, x)
            found = torch.autograd.grad(y, wanted, above.to(device))
            for part in found:
                if not bool(torch.isfinite(part).all()):
                    raise QualityError(
                        "a gradient is not finite",
                        where=f"layer {i}, one of the items {', '.join(self._names(batch.rows))}",
                        hint="compute in float32",
                    )
            if i > self.lowest:
                above.copy_(found[0])
            if out is not None:
                items = list(batch.rows)
                out[items] = np.abs(found[-1].double().cpu().numpy()) / self.passage.scored[items, None]
        return out

    def _names(self, items: Sequence[int]) -> list[str]:
        return [repr(self.passage.rows[item].id) for item in items[:4]]

    def _slab(self) -> torch.Tensor:
        return self.slabs.make(self.passage.positions, self.model.hidden_size, self.model.dtype)

    def _count(self, label: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, 2 * self.model.n_layers - self.lowest, label)
