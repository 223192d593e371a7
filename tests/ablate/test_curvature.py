"""Squared gradients, streamed, are those of the whole model under autograd; and they foretell what a change costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.ablate.plain import SHAPE, changed, stock
from tests.tiny import make_tiny

from gemcut.ablate.curvature import curvature
from gemcut.ablate.passage import lay_out
from gemcut.ablate.settings import AblateSettings
from gemcut.checkpoint.read import open_checkpoint
from gemcut.errors import UsageError
from gemcut.records.curvature import Curvature
from gemcut.stream.corpus import Corpus


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], corpus: Corpus) -> dict[str, Curvature]:
    return {kind: curvature(open_checkpoint(folder), corpus, seed=5) for kind, folder in folders.items()}


def direct(folder: Path, corpus: Corpus, seed: int) -> dict[str, np.ndarray]:
    """Σ_q G_q² float64 of every matrix, from one backward pass of the stock model per item."""
    model = stock(folder)
    generator = torch.Generator().manual_seed(seed)
    matrices = {name: part.requires_grad_(True) for name, part in model.named_parameters() if part.ndim > 1}
    squares = {name: torch.zeros(part.shape, dtype=torch.float64) for name, part in matrices.items()}
    for batch in lay_out(open_checkpoint(folder), corpus, 1).batches:
        (item,) = batch.rows
        ids = torch.from_numpy(corpus.items[item].ids.copy())
        log_p = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1], -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_p.gather(-1, drawn).sum(), list(matrices.values()), allow_unused=True)
        for name, gradient in zip(matrices, gradients, strict=True):
            if gradient is not None:
                squares[name] += gradient.double() ** 2
    return {name[name.find("layers.") :]: value.numpy() for name, value in squares.items() if ".layers." in name}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_streamed_is_the_whole_model(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, Curvature], kind: str
) -> None:
    wanted = direct(folders[kind], corpus, seed=5)
    got = found[kind]
    assert got.tokens == sum(len(row.ids) - 1 for row in corpus.items)
    layers = {name: one for name, one in got.tensors.items() if ".layers." in name}
    names = {name.removeprefix("model.language_model."): name for name in layers}
    assert set(names) == {n for n in wanted if n.startswith("layers.") and "router" not in n}
    for short, name in names.items():
        square = wanted[short].reshape(-1, *wanted[short].shape[-2:])
        assert square.sum() > 0
        scale = square.sum(-1).max()
        np.testing.assert_allclose(layers[name].rows, square.sum(-1), rtol=2e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(layers[name].columns, square.sum(-2), rtol=2e-4, atol=1e-5 * scale)


def test_a_second_draw_is_another_one(folders: dict[str, Path], corpus: Corpus, found: dict[str, Curvature]) -> None:
    both = curvature(open_checkpoint(folders["dense"]), corpus, draws=2, seed=5)
    assert both.tokens == 2 * found["dense"].tokens
    for name, one in found["dense"].tensors.items():
        assert (both.tensors[name].rows >= one.rows * (1 - 1e-6)).all()
        assert both.tensors[name].rows.sum() > one.rows.sum()
    with pytest.raises(UsageError, match="at least one draw"):
        curvature(open_checkpoint(folders["dense"]), corpus, draws=0)


def test_the_same_seed_gives_the_same_bits(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, Curvature], tmp_path: Path
) -> None:
    settings = AblateSettings(memory_bytes=0, scratch=tmp_path)  # hidden states on disk
    again = curvature(open_checkpoint(folders["dense"]), corpus, settings, seed=5)
    other = curvature(open_checkpoint(folders["dense"]), corpus, seed=6)
    for name, one in found["dense"].tensors.items():
        np.testing.assert_array_equal(again.tensors[name].columns, one.columns)
        assert (other.tensors[name].columns != one.columns).any()


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.down_proj", "embed_tokens"])
def test_half_the_curvature_times_the_square_is_the_divergence(part: str, corpus: Corpus, tmp_path: Path) -> None:
    """A small random change of one kind of matrix, whose KLD is measured on the same text. Dense: where a router flips,
    there is no curvature."""
    folder = make_tiny(tmp_path / "base", "dense", dtype="float32", **SHAPE | {"initializer_range": 0.05})
    drawn = curvature(open_checkpoint(folder), corpus, draws=12)
    predicted, generator = 0.0, torch.Generator().manual_seed(1)

    def nudge(name: str, value: torch.Tensor) -> torch.Tensor:
        nonlocal predicted
        if part not in name:
            return value
        noise = 2e-3 * value.std() * torch.randn(value.shape, generator=generator)
        one = drawn.tensors[name]
        square = noise.double().numpy().reshape(-1, *noise.shape[-2:]) ** 2
        for u in range(len(square)):
            total = one.rows[u].sum()
            predicted += float(one.rows[u] @ square[u] @ one.columns[u]) / total if total else 0.0
        return value + noise

    base, other = stock(folder), stock(changed(folder, tmp_path / "nudged", nudge))
    divergence = tokens = 0.0
    for row in corpus.items:
        ids = torch.from_numpy(row.ids.copy())[None]
        p, q = (
            torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
            for model in (base, other)
        )
        divergence += float((p.exp() * (p - q)).sum())
        tokens += p.shape[0]
    predicted /= 2 * drawn.tokens
    assert divergence / tokens == pytest.approx(predicted, rel=0.5)
