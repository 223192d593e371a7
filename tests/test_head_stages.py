"""Stages of a head cut: the order in which layers may get their bytes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gemcut import head_stages, stages
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.plan.heads import plan_heads
from gemcut.recipe import Choice, HeadWords, Observe
from gemcut.score.heads import score_heads
from gemcut.types import Plan
from tiny import make_tiny, write_corpus

QUIET, LOUD = 3, 1  # layers where head 0 adds next to nothing, and nearly all


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its statistics; head 0 is scaled down in one layer and up in another."""
    folder = tmp_path_factory.mktemp("head-stages")
    base = make_tiny(folder / "base", "dense", dtype="float32", max_position_embeddings=2048)
    names = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for layer, factor in ((QUIET, 0.01), (LOUD, 100.0)):
        name = next(n for n in names if n.endswith(f"layers.{layer}.self_attn.o_proj.weight"))
        state = load_file(base / names[name])
        state[name][:, :16] *= factor
        save_file(state, base / names[name], metadata={"format": "pt"})
    corpus = write_corpus(folder / "calibration.jsonl", 1)
    words = Observe(corpus=str(corpus), dtype="float32")
    checkpoint = open_checkpoint(base)
    stages.observe(checkpoint, stages.corpus_of(words, checkpoint), folder / "stats", words)
    return folder


def plan_of(base: Checkpoint, place: Path, criterion: str) -> Plan:
    choice, words = Choice(criterion=criterion), HeadWords(kind="heads", drop=1)
    return head_stages.plan_heads(base, place / "stats", choice, words).plan


def test_the_harmless_layer_comes_first_and_the_harmful_one_last(place: Path) -> None:
    """By what the dropped head added to its layer, whichever criterion chose it."""
    base = open_checkpoint(place / "base")
    scores = score_heads(base, place / "stats", "random", drop=1)
    scores.values[:, 0] = -1.0  # head 0 goes everywhere
    shapes = {n: base.family.attention(base.text_config, base.tensors.keys(), n) for n in scores.layers}
    damage = head_stages.damage_of(base, plan_heads(scores, shapes, drop=1).plan, place / "stats", None)
    order = sorted(damage, key=lambda layer: damage[layer])
    assert order[0] == QUIET
    assert order[-1] == LOUD
    assert damage[QUIET] < 1e-3
    assert damage[LOUD] > 0.99
    assert all(0.02 < damage[layer] < 0.8 for layer in order[1:-1])


def test_positions_of_a_search_are_no_damage(place: Path) -> None:
    """The sums of `obs` are the same in every layer: they order nothing."""
    base = open_checkpoint(place / "base")
    plan = plan_of(base, place, "obs")
    scores = score_heads(base, place / "stats", "obs", drop=1)
    rows = {layer: scores.values[i, list(plan.layers[layer].drop)].sum() for i, layer in enumerate(scores.layers)}
    assert set(rows.values()) == {0.0}
    damage = head_stages.damage_of(base, plan, place / "stats", None)
    assert damage.keys() == plan.layers.keys()
    assert len(set(damage.values())) == len(damage)
    norm = score_heads(base, place / "stats", "norm", drop=1)
    for i, layer in enumerate(norm.layers):
        share = norm.values[i, list(plan.layers[layer].drop)].sum() / norm.values[i].sum()
        np.testing.assert_allclose(damage[layer], share)
