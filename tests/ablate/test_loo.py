"""Leave-one-out in one streamed pass is the difference of two whole models, whatever the batches and the budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ablate.plain import HEADS, LAYERS, changed, head_widths, item_losses, layers_of, make_corpus, stock

from gemcut.ablate import AblateSettings, loo, loo_bytes, taylor, taylor_bytes
from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, MissingError, QualityError, UsageError
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import StreamedModel
from gemcut.types import HeadImportance


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], corpus: Corpus) -> dict[str, HeadImportance]:
    return {kind: loo(open_checkpoint(folder), corpus) for kind, folder in folders.items()}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were read, in order."""
    seen: list[int] = []
    real = StreamedModel.layer

    def noting(self: StreamedModel, i: int) -> Any:
        seen.append(i)
        return real(self, i)

    monkeypatch.setattr(StreamedModel, "layer", noting)
    return seen


@torch.no_grad()
def direct(folder: Path, corpus: Corpus) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """[L, U] and the same per class: the stock model whole, and a hook that zeroes one head in o_proj's input."""
    model, widths = stock(folder), head_widths(folder)
    base = item_losses(model, corpus)
    rise = np.zeros((len(corpus.items), LAYERS, HEADS))
    for layer in range(LAYERS):
        for head in range(HEADS):
            width = widths[layer]

            def zero(_: Any, args: Any, at: int = head * width, width: int = width) -> Any:
                x = args[0].clone()
                x[..., at : at + width] = 0
                return (x,)

            handle = layers_of(model)[layer].self_attn.o_proj.register_forward_pre_hook(zero)
            rise[:, layer, head] = [float((a - b).sum()) for a, b in zip(item_losses(model, corpus), base, strict=True)]
            handle.remove()
    tokens = np.array([len(row.ids) - 1 for row in corpus.items])
    cls = np.array([row.cls for row in corpus.items])
    by_class = {c: rise[cls == c].sum(0) / tokens[cls == c].sum() for c in corpus.classes}
    return rise.sum(0) / tokens.sum(), by_class


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_streamed_is_the_whole_model(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, HeadImportance], kind: str
) -> None:
    wanted, by_class = direct(folders[kind], corpus)
    assert np.abs(wanted).min() > 1e-5  # the comparison is about something
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(found[kind].values, wanted, rtol=0, atol=1e-6)
    for c, name in enumerate(corpus.classes):
        np.testing.assert_allclose(found[kind].per_class[c], by_class[name], rtol=0, atol=2e-6)


def test_the_record_says_what_was_measured(folders: dict[str, Path], corpus: Corpus) -> None:
    checkpoint = open_checkpoint(folders["dense"])
    got = loo(checkpoint, corpus, AblateSettings(dtype="bfloat16", layers=(3, 1)))
    assert (got.method, got.layers, got.units, got.dtype) == ("loo", (1, 3), HEADS, "bfloat16")
    assert (got.tokens, got.items, got.classes) == (corpus.scored_tokens, 8, ("code", "math", "story"))
    assert (got.model_fingerprint, got.corpus_hash, got.template_hash) == (checkpoint.fingerprint, "a" * 64, "b" * 64)
    assert got.stderr is not None
    assert (got.stderr > 0).all()


def test_classes_add_up_to_the_whole(corpus: Corpus, found: dict[str, HeadImportance]) -> None:
    tokens = {c: sum(len(row.ids) - 1 for row in corpus.items if row.cls == c) for c in corpus.classes}
    shares = np.array([tokens[c] for c in corpus.classes]) / corpus.scored_tokens
    pooled = np.einsum("c,clu->lu", shares, found["moe"].per_class)
    np.testing.assert_allclose(pooled, found["moe"].values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_batches_change_nothing(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, HeadImportance], kind: str
) -> None:
    alone = loo(open_checkpoint(folders[kind]), corpus, AblateSettings(batch_tokens=1))
    np.testing.assert_allclose(alone.values, found[kind].values, rtol=0, atol=1e-6)


def test_every_layer_is_read_once(folders: dict[str, Path], corpus: Corpus, loads: list[int]) -> None:
    calls: list[tuple[int, int]] = []
    loo(open_checkpoint(folders["dense"]), corpus, progress=lambda done, total, _: calls.append((done, total)))
    assert loads == list(range(LAYERS))
    passes = LAYERS + HEADS * sum(LAYERS - i for i in range(LAYERS))
    assert calls == [(i + 1, passes) for i in range(passes)]


@pytest.mark.parametrize(("slabs", "rounds"), [(2, 16), (4, 6), (6, 4), (17, 1), (40, 1)])
def test_rounds_within_a_budget_give_the_same_bits(
    folders: dict[str, Path],
    corpus: Corpus,
    found: dict[str, HeadImportance],
    loads: list[int],
    tmp_path: Path,
    slabs: int,
    rounds: int,
) -> None:
    checkpoint = open_checkpoint(folders["dense"])
    one = loo_bytes(checkpoint, corpus)
    assert one.all_bytes == 17 * one.slab_bytes
    budget: dict[str, Any] = {"max_bytes": slabs * one.slab_bytes, "memory_bytes": 0, "scratch": tmp_path}
    size = loo_bytes(checkpoint, corpus, AblateSettings(**budget))
    assert size.rounds == rounds
    assert size.state_bytes <= budget["max_bytes"]
    calls: list[tuple[int, int]] = []
    got = loo(checkpoint, corpus, AblateSettings(**budget), progress=lambda done, total, _: calls.append((done, total)))
    np.testing.assert_array_equal(got.values, found["dense"].values)
    assert len(loads) == size.layer_loads
    assert calls[-1] == (size.passes, size.passes)
    assert len(calls) == size.passes
    assert os.listdir(tmp_path) == []


def test_some_layers_are_rows_of_all(
    folders: dict[str, Path], corpus: Corpus, found: dict[str, HeadImportance]
) -> None:
    got = loo(open_checkpoint(folders["moe"]), corpus, AblateSettings(layers=(2,)))
    np.testing.assert_array_equal(got.values, found["moe"].values[[2]])


def without_columns(name: str, value: torch.Tensor) -> torch.Tensor:
    """Head 3 of layer 0 (sliding, width 16) and head 1 of layer 1 (full, width 32)."""
    if name.endswith("layers.0.self_attn.o_proj.weight"):
        value[:, 48:64] = 0
    if name.endswith("layers.1.self_attn.o_proj.weight"):
        value[:, 32:64] = 0
    return value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_head_that_nobody_reads_costs_nothing(
    folders: dict[str, Path], corpus: Corpus, tmp_path: Path, kind: str, dtype: str
) -> None:
    checkpoint = open_checkpoint(changed(folders[kind], tmp_path / "deaf", without_columns))
    for method in (loo, taylor):
        values = method(checkpoint, corpus, AblateSettings(dtype=dtype)).values
        assert np.argwhere(values == 0).tolist() == [[0, 3], [1, 1]]


def test_one_item_has_no_standard_error(folders: dict[str, Path]) -> None:
    one = make_corpus(folders["dense"], (12,))
    checkpoint = open_checkpoint(folders["dense"])
    assert loo(checkpoint, one, AblateSettings(layers=(3,))).stderr is None
    assert taylor(checkpoint, one, AblateSettings(layers=(3,))).stderr is None


# ---------------------------------------------------------------- what must be refused, by both methods


@pytest.mark.parametrize("method", [loo, taylor])
@pytest.mark.parametrize("tensor", ["self_attn.q_proj.weight", "mlp.down_proj.weight"])
def test_a_broken_weight_is_named(
    folders: dict[str, Path], corpus: Corpus, tmp_path: Path, method: Any, tensor: str
) -> None:
    def breaking(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith(f"layers.2.{tensor}"):
            value[3, 5] = float("nan")
        return value

    checkpoint = open_checkpoint(changed(folders["dense"], tmp_path / "broken", breaking))
    with pytest.raises(CheckpointError, match=rf"layer 2's {tensor} holds NaN"):
        method(checkpoint, corpus)


@pytest.mark.parametrize("method", [loo, taylor])
@pytest.mark.parametrize(
    ("tensor", "said"), [("norm.weight", "a loss is not finite"), ("embed_tokens.weight", "embedding is not finite")]
)
def test_broken_ends_are_named(
    folders: dict[str, Path], corpus: Corpus, tmp_path: Path, method: Any, tensor: str, said: str
) -> None:
    def breaking(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith(f"language_model.{tensor}"):
            value[...] = float("inf")
        return value

    checkpoint = open_checkpoint(changed(folders["dense"], tmp_path / "broken", breaking))
    with pytest.raises(QualityError, match=said):
        method(checkpoint, corpus)


@pytest.mark.parametrize("method", [loo, taylor])
@pytest.mark.parametrize("layers", [(), (0, 0), (LAYERS,), (-1,)])
def test_layers_that_are_not_there(
    folders: dict[str, Path], corpus: Corpus, method: Any, layers: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match="not layers of the model"):
        method(open_checkpoint(folders["dense"]), corpus, AblateSettings(layers=layers))


@pytest.mark.parametrize("method", [loo, taylor])
def test_another_tokenizer_and_no_items(folders: dict[str, Path], corpus: Corpus, method: Any) -> None:
    checkpoint: Checkpoint = open_checkpoint(folders["dense"])
    other = Corpus(corpus.items, "a" * 64, "b" * 64, "c" * 64, "", 4096, 0, corpus.classes)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        method(checkpoint, other)
    none = Corpus((), "a" * 64, "b" * 64, corpus.tokenizer_hash, "", 4096, 0, ())
    with pytest.raises(UsageError, match="no items"):
        method(checkpoint, none)
    with pytest.raises(UsageError, match="batch_tokens"):
        method(checkpoint, corpus, AblateSettings(batch_tokens=0))


@pytest.mark.parametrize(("method", "least"), [(loo, 2), (taylor, LAYERS + 1)])
def test_no_room_is_refused_before_any_work(
    folders: dict[str, Path], corpus: Corpus, tmp_path: Path, loads: list[int], method: Any, least: int
) -> None:
    checkpoint = open_checkpoint(folders["dense"])
    slab = loo_bytes(checkpoint, corpus).slab_bytes
    assert taylor_bytes(checkpoint, corpus) == (LAYERS + 1) * slab
    options: dict[str, Any] = {"memory_bytes": 0, "scratch": tmp_path}
    with pytest.raises(MissingError, match="no room for the hidden states"):
        method(checkpoint, corpus, AblateSettings(max_bytes=least * slab - 1, **options))
    assert loads == []
    layers = (3,) if method is loo else None
    method(checkpoint, corpus, AblateSettings(layers, max_bytes=least * slab, **options))
    assert os.listdir(tmp_path) == []
