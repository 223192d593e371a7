"""Gradients layer by layer are those of the whole model under autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ablate.plain import HEADS, LAYERS, head_widths, item_losses, layers_of, stock

from gemcut.ablate import AblateSettings, taylor
from gemcut.checkpoint.read import open_checkpoint
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import StreamedModel
from gemcut.types import HeadImportance


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], corpus: Corpus) -> dict[str, HeadImportance]:
    return {kind: taylor(open_checkpoint(folder), corpus) for kind, folder in folders.items()}


def direct(folder: Path, corpus: Corpus) -> np.ndarray:
    """|∂ mean loss of the item / ∂α| float64 [Q, L, U] from one backward pass of the stock model per item."""
    model, widths = stock(folder), head_widths(folder)
    alpha = torch.ones(LAYERS, HEADS, requires_grad=True)
    for i, layer in enumerate(layers_of(model)):

        def scale(_: Any, args: Any, i: int = i) -> Any:
            return (args[0] * alpha[i].repeat_interleave(widths[i]),)

        layer.self_attn.o_proj.register_forward_pre_hook(scale)
    out = []
    for loss in item_losses(model, corpus):
        (gradient,) = torch.autograd.grad(loss.mean(), alpha)
        out.append(gradient.abs().double().numpy())
    return np.stack(out)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_streamed_is_the_whole_model(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, HeadImportance], kind: str
) -> None:
    per_item = direct(folders[kind], corpus)
    got = found[kind]
    assert per_item.mean(0).min() > 1e-3  # the comparison is about something
    np.testing.assert_allclose(got.values, per_item.mean(0), rtol=1e-5, atol=1e-5)
    assert got.stderr is not None
    np.testing.assert_allclose(got.stderr, per_item.std(0, ddof=1) / np.sqrt(len(per_item)), rtol=1e-4, atol=1e-5)
    for c, name in enumerate(got.classes):
        rows = [i for i, row in enumerate(corpus.items) if row.cls == name]
        np.testing.assert_allclose(got.per_class[c], per_item[rows].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_batches_change_nothing(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, HeadImportance], kind: str
) -> None:
    alone = taylor(open_checkpoint(folders[kind]), corpus, AblateSettings(batch_tokens=1))
    np.testing.assert_allclose(alone.values, found[kind].values, rtol=0, atol=1e-6)


def test_some_layers_are_rows_of_all_and_no_lower_layer_is_read_again(
    folders: dict[str, Path],
    corpus: Corpus,
    found: dict[str, HeadImportance],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[int] = []
    real = StreamedModel.layer

    def noting(self: StreamedModel, i: int) -> Any:
        loads.append(i)
        return real(self, i)

    monkeypatch.setattr(StreamedModel, "layer", noting)
    calls: list[tuple[int, int]] = []
    got = taylor(
        open_checkpoint(folders["moe"]),
        corpus,
        AblateSettings(layers=(3, 1)),
        progress=lambda done, total, _: calls.append((done, total)),
    )
    assert (got.method, got.layers) == ("taylor", (1, 3))
    np.testing.assert_array_equal(got.values, found["moe"].values[[1, 3]])
    assert loads == [0, 1, 2, 3, 3, 2, 1]
    assert calls == [(i + 1, 7) for i in range(7)]


def test_sixteen_bits_are_near(folders: dict[str, Path], corpus: Corpus, found: dict[str, HeadImportance]) -> None:
    got = taylor(open_checkpoint(folders["dense"]), corpus, AblateSettings(dtype="bfloat16"))
    assert got.dtype == "bfloat16"
    assert np.corrcoef(got.values.ravel(), found["dense"].values.ravel())[0, 1] > 0.95
