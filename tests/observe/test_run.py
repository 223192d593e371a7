"""The whole pass against a plain run of the stock model, and what a user can do wrong."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.observe.conftest import corpus_of, make_corpus
from tests.observe.plain import plain_statistics

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, MissingError, QualityError, UsageError
from gemcut.observe.memory import observe_memory_bytes
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from gemcut.records.statistics import load_statistics

Tiny = Callable[[str], Checkpoint]
FLOAT = ObserveSettings(dtype="float32", batch_tokens=64)
LAYERS = 6


def layer_file(folder: Path, layer: int) -> dict[str, Any]:
    return {name: value.numpy() for name, value in load_file(folder / f"layer-{layer:03d}.safetensors").items()}


def assert_close(found: Any, wanted: Any, name: str, rtol: float) -> None:
    scale = np.abs(wanted).max() if np.size(wanted) else 0.0
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.fixture(scope="module")
def observed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return observe(tiny("moe"), make_corpus(), tmp_path_factory.mktemp("run") / "stats", settings=FLOAT)


@pytest.mark.parametrize("kind", ["moe", "moe-text", "dense", "dense-text"])
def test_equals_a_plain_run_of_the_stock_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    corpus, checkpoint = make_corpus(), tiny(kind)
    out = observe(checkpoint, corpus, tmp_path / "stats", settings=FLOAT)
    for i, wanted in enumerate(plain_statistics(checkpoint.path, corpus, LAYERS, moe=kind.startswith("moe"))):
        found = layer_file(out, i)
        assert {n for n in found if not n.startswith("near.sample")} == set(wanted), i
        for name, value in wanted.items():
            assert found[name].shape == value.shape, name
            # the last digits of 1 − cos are lost in the plain formula, not in ours
            assert_close(found[name], value, f"layer {i} {name}", 1e-4 if name.endswith("easy") else 2e-5)


def test_every_token_goes_to_k_experts(observed: Path) -> None:
    statistics = load_statistics(observed)
    meta = statistics.meta
    assert meta.layers == tuple(range(LAYERS))
    assert (statistics.by_class["n"].sum((0, 2)) == meta.top_k * meta.tokens).all()
    per_question = statistics.by_question["n"].sum(2)  # [Q, L]
    assert (per_question == meta.top_k * np.array([q.tokens for q in meta.questions])[:, None]).all()
    for i in range(LAYERS):
        tensors = layer_file(observed, i)
        assert (tensors["linear.experts.gate_up_proj.n"].sum(0) == statistics.by_class["n"][:, i].sum(0)).all()
        assert tensors["linear.self_attn.q_proj.n"].sum() == meta.tokens
        assert tensors["near.count"].sum() == meta.top_k * meta.tokens


def test_questions_add_up_to_classes(observed: Path) -> None:
    statistics = load_statistics(observed)
    for name, per_question in statistics.by_question.items():
        for c, cls in enumerate(statistics.meta.classes):
            mine = [i for i, q in enumerate(statistics.meta.questions) if q.cls == cls]
            total = per_question[mine].astype(np.float64).sum(0)
            np.testing.assert_allclose(total, statistics.by_class[name][c], rtol=1e-6, atol=1e-9)


def test_batch_size_changes_nothing_but_rounding(tiny: Tiny, observed: Path, tmp_path: Path) -> None:
    corpus = make_corpus()
    for batch_tokens in (1, 1000):
        settings = replace(FLOAT, batch_tokens=batch_tokens)
        other = observe(tiny("moe"), corpus, tmp_path / str(batch_tokens), settings=settings)
        for i in range(LAYERS):
            a, b = layer_file(observed, i), layer_file(other, i)
            for name in a:
                if name.endswith((".n", ".count", ".heir", "sample_token", "sample_index")):
                    assert (a[name] == b[name]).all(), name
                else:
                    assert_close(b[name], a[name], f"layer {i} {name}", 1e-5)


def test_the_order_of_the_items_changes_no_expert_sum(tiny: Tiny, observed: Path, tmp_path: Path) -> None:
    corpus = make_corpus()
    order = [2, 1, 0, 5, 4, 3, 8, 7, 6]  # halves stay halves: parity is by index
    shuffled = corpus_of(tuple(corpus.items[i] for i in order))
    other = load_statistics(observe(tiny("moe"), shuffled, tmp_path / "stats", settings=FLOAT))
    first = load_statistics(observed)
    for name, value in first.by_class.items():
        assert (other.by_class[name] == value).all(), name
    for name, per_question in first.by_question.items():
        assert (other.by_question[name] == per_question[order]).all(), name


def test_the_router_sample_is_the_routers_own_choice(tiny: Tiny, observed: Path, tmp_path: Path) -> None:
    tokens = load_statistics(observed).meta.tokens
    few = observe(tiny("moe"), make_corpus(), tmp_path / "few", settings=replace(FLOAT, near_sample=17, seed=3))
    for i in range(LAYERS):
        whole, part = layer_file(observed, i), layer_file(few, i)
        assert len(whole["near.sample_token"]) == tokens
        assert len(part["near.sample_token"]) == 17
        assert (part["near.sample_token"] == layer_file(few, 0)["near.sample_token"]).all()
        assert (part["near.sample_index"] == whole["near.sample_index"][part["near.sample_token"]]).all()
        logits = whole["near.sample_logit"]
        assert (np.diff(logits, axis=1) <= 0).all()  # ranked, best first
        index = whole["near.sample_index"]
        routed = np.bincount(index[:, :2].ravel(), minlength=8)
        assert (routed == whole["experts.by_class.n"].sum(0)).all()


def test_a_strided_gram_counts_its_tokens(tiny: Tiny, tmp_path: Path) -> None:
    out = observe(tiny("dense"), make_corpus(), tmp_path / "stats", settings=replace(FLOAT, gram_tokens=25))
    for i in range(LAYERS):
        tensors = layer_file(out, i)
        assert tensors["gram.self_attn.o_proj.n"].sum() == 25
        gram = tensors["gram.self_attn.o_proj.g"]
        assert (gram == gram.transpose(0, 2, 1)).all()
        assert np.linalg.eigvalsh(gram.sum(0)).min() > -1e-6 * np.trace(gram.sum(0))


def test_shared_inputs_are_stored_once_and_named(observed: Path) -> None:
    aliases = json.loads((observed / "observation.json").read_text())["aliases"]
    assert aliases == {
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "mlp.up_proj": "mlp.gate_proj",
    }
    assert "linear.self_attn.k_proj.a2" not in layer_file(observed, 0)


def test_the_folder_holds_no_leftovers_and_no_local_path(observed: Path) -> None:
    names = sorted(p.name for p in observed.iterdir())
    assert names == [f"layer-{i:03d}.safetensors" for i in range(LAYERS)] + ["observation.json", "statistics.json"]
    for name in ("observation.json", "statistics.json"):
        assert str(observed.parent) not in (observed / name).read_text()


# ---------------------------------------------------------------- what stops a pass


def plant(source: Path, folder: Path, tensor: str, at: tuple[int, ...], value: float) -> Checkpoint:
    shutil.copytree(source, folder)
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]
    state = load_file(folder / shard)
    state[tensor][at] = value
    save_file(state, folder / shard, metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_nan_in_an_expert_names_layer_expert_and_token(tiny: Tiny, tmp_path: Path) -> None:
    tensor = "model.language_model.layers.3.experts.down_proj"
    checkpoint = plant(tiny("moe").path, tmp_path / "nan", tensor, (5, 7, 3), float("nan"))
    with pytest.raises(CheckpointError) as caught:
        observe(checkpoint, make_corpus(), tmp_path / "stats", settings=FLOAT)
    text = str(caught.value)
    assert "layer 3, expert 5, item 'q" in text
    assert "token " in text
    assert "experts.down_proj" in text
    assert not (tmp_path / "stats").exists()


def test_the_blamed_token_is_one_that_the_expert_saw(tiny: Tiny, tmp_path: Path) -> None:
    """Against routing of the sound model: up to the poisoned layer both compute the same."""
    corpus = make_corpus()
    sound = load_statistics(observe(tiny("moe"), corpus, tmp_path / "sound", settings=FLOAT))
    tensor = "model.language_model.layers.0.experts.gate_up_proj"
    rare = int(np.argmin(np.where(sound.by_class["n"][:, 0].sum(0) > 0, sound.by_class["n"][:, 0].sum(0), np.inf)))
    checkpoint = plant(tiny("moe").path, tmp_path / "nan", tensor, (rare, 0, 0), float("inf"))
    with pytest.raises(CheckpointError) as caught:
        observe(checkpoint, corpus, tmp_path / "stats", settings=FLOAT)
    named = next(i for i, row in enumerate(corpus.items) if f"item {row.id!r}," in str(caught.value))
    assert sound.by_question["n"][named, 0, rare] > 0


def test_nan_in_attention_names_the_tensor(tiny: Tiny, tmp_path: Path) -> None:
    tensor = "model.language_model.layers.2.self_attn.q_norm.weight"
    checkpoint = plant(tiny("dense").path, tmp_path / "nan", tensor, (1,), float("nan"))
    with pytest.raises(CheckpointError, match=r"self_attn\.q_norm\.weight"):
        observe(checkpoint, make_corpus(), tmp_path / "stats", settings=FLOAT)


def test_finite_weights_that_overflow_are_a_matter_of_quality(tiny: Tiny, tmp_path: Path) -> None:
    tensor = "model.language_model.layers.1.pre_feedforward_layernorm_2.weight"
    checkpoint = plant(tiny("moe").path, tmp_path / "huge", tensor, (slice(None),), 1e30)
    with pytest.raises(QualityError, match="layer 1, expert"):
        observe(checkpoint, make_corpus(), tmp_path / "stats", settings=FLOAT)


def test_an_empty_corpus_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no items"):
        observe(tiny("moe"), corpus_of(()), tmp_path / "stats", settings=FLOAT)


def test_token_ids_of_another_tokenizer_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    rows = list(make_corpus(3).items)
    rows[1] = replace(rows[1], ids=np.array([2, 500], np.int64))
    with pytest.raises(UsageError, match="does not know"):
        observe(tiny("moe"), corpus_of(tuple(rows)), tmp_path / "stats", settings=FLOAT)


def test_too_little_memory_says_what_would_do(tiny: Tiny, tmp_path: Path) -> None:
    needed = observe_memory_bytes(tiny("moe"), FLOAT, longest=40)
    with pytest.raises(MissingError, match=f"at least {needed / 2**30:.2f} GiB"):
        observe(tiny("moe"), make_corpus(), tmp_path / "s", settings=replace(FLOAT, max_memory=needed // 2))
    assert not list(tmp_path.iterdir())
    enough = replace(FLOAT, max_memory=2 * needed)
    assert observe(tiny("moe"), make_corpus(2), tmp_path / "s", settings=enough).is_dir()


# ---------------------------------------------------------------- finished, other, forced


def test_a_finished_observation_is_not_computed_again(
    tiny: Tiny, observed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in observed.iterdir()}
    with caplog.at_level(logging.INFO):
        # neither batch size nor a memory budget makes another observation
        observe(tiny("moe"), make_corpus(), observed, settings=replace(FLOAT, batch_tokens=999, max_memory=1 << 40))
    assert {p.name: p.stat().st_mtime_ns for p in observed.iterdir()} == before
    assert "finished already" in caplog.text


@pytest.mark.parametrize("other", ["corpus", "settings", "model"])
def test_another_observation_in_the_same_place_needs_force(
    tiny: Tiny, observed: Path, tmp_path: Path, other: str
) -> None:
    folder = shutil.copytree(observed, tmp_path / "stats")
    checkpoint = tiny("moe-text" if other == "model" else "moe")
    corpus = make_corpus(4, seed=9) if other == "corpus" else make_corpus()
    settings = replace(FLOAT, gram_tokens=20) if other == "settings" else FLOAT
    with pytest.raises(UsageError, match="another model, corpus or settings"):
        observe(checkpoint, corpus, folder, settings=settings)
    assert load_statistics(folder).fingerprint == load_statistics(observed).fingerprint
    observe(checkpoint, corpus, folder, settings=settings, force=True)
    assert load_statistics(folder).fingerprint != load_statistics(observed).fingerprint


def test_a_folder_of_something_else_is_not_touched(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no observation"):
        observe(tiny("moe"), make_corpus(), tmp_path / "stats", settings=FLOAT)
    assert (tmp_path / "stats" / "letter.txt").read_text() == "mine"


def test_progress_counts_up_to_the_whole(tiny: Tiny, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    corpus = make_corpus()
    observe(tiny("moe"), corpus, tmp_path / "s", settings=FLOAT, progress=lambda *x: told.append(x))
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})
    assert told[-1] == (corpus.tokens * LAYERS, corpus.tokens * LAYERS, "layer 5")


def test_bfloat16_agrees_with_float32_roughly(tiny: Tiny, observed: Path, tmp_path: Path) -> None:
    """Layer 0 has the same inputs in both: its sums differ by the rounding of bfloat16 only."""
    out = observe(tiny("moe"), make_corpus(), tmp_path / "s", settings=ObserveSettings(batch_tokens=64))
    assert load_statistics(out).meta.dtype == "bfloat16"
    by_name = ObserveSettings(dtype="bfloat16")  # the same thing said explicitly: finished already
    assert observe(tiny("moe"), make_corpus(), out, settings=by_name) == out
    a, b = layer_file(observed, 0), layer_file(out, 0)
    for name in ("linear.self_attn.q_proj.a2", "linear.self_attn.o_proj.a2", "linear.mlp.down_proj.a2"):
        np.testing.assert_allclose(b[name], a[name], rtol=0.05, atol=0.02 * a[name].max())
    assert torch.isfinite(torch.from_numpy(b["gram.self_attn.o_proj.g"])).all()
