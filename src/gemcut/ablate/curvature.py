"""What a change of each weight does to the model's answers: the diagonal of the Fisher information, by its margins.

A small change ΔW of a matrix moves the distribution over the next token by

    KLD ≈ ½ Σ_ij F[i, j]·ΔW[i, j]²,   F[i, j] = E_items E_y ( ∂ Σ ln p(y) / ∂W[i, j] )² per predicted token,

y drawn from the model's own answers (with the text's tokens it would measure what surprises the text holds), and errors
of different weights taken as unrelated, which rounding errors nearly are. F itself is as large as the model; kept are
its sums over rows and over columns, whose product over the total stands for it.

As `taylor`, the pass forward keeps what enters every layer, and the pass backward has one layer in memory. Every item
goes back alone, since squares are taken of an item's whole gradient. The output layer is the exception: its gradient is
as large as the vocabulary, so that its squares are taken of each token's; where it is tied to the embedding, what
comes in from below is added, without the mixed terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gemcut.ablate.passage import Passage, lay_out, loss_head, room, slab_bytes
from gemcut.ablate.settings import DEFAULTS, AblateSettings
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.records.curvature import Curvature, Margins
from gemcut.stream.corpus import Corpus
from gemcut.stream.hidden import Slabs
from gemcut.stream.model import StreamedModel

Progress = Callable[[int, int, str], None]
_TILE_ELEMENTS = 4 << 20  # logits of one tile; about eight times that in float32 is alive at once
_NOT_QUANTISED = ("router.", "norm")


@dataclass(slots=True)
class _Sums:
    """rows [U, R], columns [U, F]: float64, on the CPU."""

    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, shape: torch.Size) -> _Sums:
        units = shape[0] if len(shape) == 3 else 1
        return cls(
            torch.zeros((units, shape[-2]), dtype=torch.float64), torch.zeros((units, shape[-1]), dtype=torch.float64)
        )

    def add(self, gradient: torch.Tensor) -> None:
        """The squares of one item's gradient [R, F] or [U, R, F]."""
        squares = gradient.float().square_().reshape(len(self.rows), *gradient.shape[-2:])
        self.rows += squares.sum(-1).double().cpu()
        self.columns += squares.sum(-2).double().cpu()


def curvature_bytes(checkpoint: Checkpoint, corpus: Corpus, settings: AblateSettings = DEFAULTS) -> int:
    """Hidden states that `curvature` keeps at once: what enters every layer, and the gradient."""
    passage = lay_out(checkpoint, corpus, 1)
    layers = checkpoint.text_config.get("num_hidden_layers")
    return slab_bytes(checkpoint, passage, settings.dtype) * (int(layers if isinstance(layers, int) else 0) + 2)


def curvature(
    checkpoint: Checkpoint,
    corpus: Corpus,
    settings: AblateSettings = DEFAULTS,
    *,
    draws: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curvature:
    """Margins of every matrix that can be quantised, and of the embedding.

        rows[i] = Σ_q Σ_j G_q[i, j]²,  columns[j] = Σ_q Σ_i G_q[i, j]²,  G_q = ∂ Σ_t ln p(y_t) / ∂W over item q

    Layers in `dtype`, head and softmax in float32, squares in float32, their sums in float64. A matrix that no item
    reached has zeros.

    Args:
        settings: `layers` and `batch_tokens` are of no matter here: all layers, an item at a time.
        draws: answers drawn for each token; each costs another pass backward.
        seed: of the draws.
        progress: called with (layers forward and backward, in all, label).
    Raises:
        UsageError: no draw; an empty corpus; a model that cannot be streamed.
        MissingError: no room for the hidden states.
        CheckpointError: another tokenizer; a weight that is not finite.
        QualityError: a state or a gradient is not finite.
    Source:
        Kunstner et al., "Limitations of the Empirical Fisher Approximation", 2019, for why y is drawn.
    """
    if draws < 1:
        raise UsageError("a curvature needs at least one draw", got=draws)
    passage = lay_out(checkpoint, corpus, 1)
    size = slab_bytes(checkpoint, passage, settings.dtype)
    needed = curvature_bytes(checkpoint, corpus, settings) // size
    slabs, _ = room(settings, size, needed, least=needed)
    with StreamedModel.open(checkpoint, device=settings.device, dtype=settings.dtype, experts="recording") as model:
        run = _Run(model, passage, slabs, draws, progress)
        run.forward()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            run.top(generator)
            run.backward()
        tensors = {name: Margins(one.rows.numpy(), one.columns.numpy()) for name, one in sorted(run.sums.items())}
        computed = model.dtype_name
    return Curvature(
        tensors=tensors,
        tokens=int(passage.scored.sum()) * draws,
        draws=draws,
        items=len(passage.rows),
        dtype=computed,
        seed=seed,
        model_fingerprint=checkpoint.fingerprint,
        corpus_hash=corpus.hash,
    )


class _Run:
    """States of every layer, and the sums."""

    def __init__(
        self, model: StreamedModel, passage: Passage, slabs: Slabs, draws: int, progress: Progress | None
    ) -> None:
        self.model, self.passage, self.slabs, self.progress = model, passage, slabs, progress
        self.entered: list[torch.Tensor] = []
        self.gradient = self._slab()
        self.sums: dict[str, _Sums] = {}
        self.total = (1 + draws) * model.n_layers
        self.done = 0

    def forward(self) -> None:
        """`entered` gets what enters every layer, and behind it what leaves the last."""
        self.entered.append(self._slab())
        self.passage.embed(self.model, self.entered[0])
        for i in range(self.model.n_layers):
            self.entered.append(self._slab())
            with self.model.layer(i) as module:
                self.model.prefetch(i + 1)
                self.passage.through(self.model, module, i, (self.entered[i], self.entered[i + 1]), "forward")
            self._count(f"layer {i} forward")

    def top(self, generator: torch.Generator) -> None:
        """Draw answers; `gradient` becomes ∂ Σ ln p(y) / ∂(the last layer's output), the output layer gets its sums."""
        with loss_head(self.model) as head:
            step = max(1, _TILE_ELEMENTS // int(head.config.vocab_size))
            views = zip(self.passage.views(self.entered[-1]), self.passage.views(self.gradient), strict=True)
            for batch, (states, gradient) in zip(self.passage.batches, views, strict=True):
                gradient.zero_()
                scored = int(self.passage.scored[batch.rows[0]])
                for start in range(0, scored, step):
                    stop = min(start + step, scored)
                    gradient[0, start:stop] = self._tile(head, states[0, start:stop], generator)

    def _tile(self, head: StreamedModel, states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The gradient [T, H] of Σ ln p(y), y drawn for each of the states [T, H]."""
        tile = states.to(head.device, torch.float32).detach().requires_grad_()
        logits, entered, left = head.head_parts(tile)
        log_p = torch.log_softmax(logits.float(), -1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(head.device)
        found = torch.autograd.grad(log_p.gather(-1, drawn).sum(), [tile, left])
        self._check(found[0], "the output layer")
        delta, inputs = found[1].reshape(len(tile), -1).float(), entered.detach().reshape(len(tile), -1).float()
        sums = self.sums.setdefault(head.end_names()[1], _Sums.of(torch.Size((delta.shape[-1], inputs.shape[-1]))))
        squares = inputs.square()
        delta.square_()
        sums.rows[0] += (squares.sum(-1) @ delta).double().cpu()
        sums.columns[0] += (delta.sum(-1) @ squares).double().cpu()
        return found[0].to("cpu", self.gradient.dtype)

    def backward(self) -> None:
        """From the top: the gradient of every matrix, squared and summed; what is left goes into the embedding."""
        for i in reversed(range(self.model.n_layers)):
            with self.model.layer(i) as module:
                self.model.prefetch(i - 1)
                self._layer(i, module)
            self._count(f"layer {i} backward")
        self._embedding()

    def _layer(self, i: int, module: nn.Module) -> None:
        names = dict(zip(module.state_dict(keep_vars=True), self.model.tensor_names(i), strict=True))
        matrices = {
            name: part
            for name, part in module.named_parameters()
            if part.ndim >= 2 and not any(word in name for word in _NOT_QUANTISED)
        }
        for part in matrices.values():
            part.requires_grad_(True)
        views = zip(self.passage.views(self.entered[i]), self.passage.views(self.gradient), strict=True)
        for batch, (below, above) in zip(self.passage.batches, views, strict=True):
            x = below.to(self.model.device).detach().requires_grad_()
            y = self.model.run_layer_with_grad(module, x)
            found = torch.autograd.grad(y, [x, *matrices.values()], above.to(self.model.device), allow_unused=True)
            self._check(found[0], f"layer {i}, item {self.passage.rows[batch.rows[0]].id!r}")
            above.copy_(found[0])
            for name, gradient in zip(matrices, found[1:], strict=True):
                if gradient is not None:
                    self.sums.setdefault(names[name], _Sums.of(gradient.shape)).add(gradient)
        for part in matrices.values():
            part.requires_grad_(False)

    def _embedding(self) -> None:
        """∂ / ∂E[v] = scale · Σ of the gradients of the states where v came in."""
        name, scale = self.model.end_names()[0], self.model.embedding_scale
        sums = self.sums.setdefault(name, _Sums.of(torch.Size(self.model.checkpoint.ref(name).shape)))
        for batch, view in zip(self.passage.batches, self.passage.views(self.gradient), strict=True):
            ids = torch.from_numpy(self.passage.rows[batch.rows[0]].ids.copy())
            tokens, of = torch.unique(ids, return_inverse=True)
            gradient = torch.zeros((len(tokens), view.shape[-1]), dtype=torch.float32)
            gradient.index_add_(0, of, view[0, : len(ids)].float())
            gradient.mul_(scale).square_()
            sums.rows[0].index_add_(0, tokens, gradient.sum(-1).double())
            sums.columns[0] += gradient.sum(0).double()

    def _check(self, gradient: torch.Tensor, where: str) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise QualityError("a gradient is not finite", where=where, hint="compute in float32")

    def _slab(self) -> torch.Tensor:
        return self.slabs.make(self.passage.positions, self.model.hidden_size, self.model.dtype)

    def _count(self, label: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, label)
