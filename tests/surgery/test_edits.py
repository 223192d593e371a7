"""What a plan of heads means for each tensor, on headers alone where bytes do not matter; plans that mean nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import synthetic
from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.gather import edited
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.families.base import Attention
from gemcut.plan import plan_heads
from gemcut.surgery import check_plan, config_for, cut, edits_for, verify_cut
from gemcut.types import LayerPlan, Mask, Plan, Scores, Take

SMALL = synthetic.Geometry(
    hidden=32, experts=0, expert_width=0, top_k=0, dense=16, heads=8, kv_heads=4, global_kv_heads=2, head_dim=8,
    global_head_dim=16, vocabulary=64,
)  # fmt: skip
PREFIX = "model.language_model.layers."
WHOLE, THIN = (0, 1, 4, 5, 6, 7), (0, 1, 3, 4, 6, 7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("edits") / "base"
    synthetic.write(folder, layers=6, geometry=SMALL, shard_bytes=20_000)
    return open_checkpoint(folder)


def layer_plan(keep: tuple[int, ...], units: int = 8) -> LayerPlan:
    return LayerPlan(keep, {u: f"rank {u}" for u in range(units) if u not in keep})


def head_plan(base: Checkpoint, keep: dict[int, tuple[int, ...]], mode: str) -> Plan:
    layers = {layer: layer_plan(kept) for layer, kept in keep.items()}
    return Plan("heads", base.fingerprint, 8, layers, params={"mode": mode})


def structural(base: Checkpoint, **changes: tuple[int, ...]) -> Plan:
    keep = {**dict.fromkeys(range(5), WHOLE), 5: THIN}
    return head_plan(base, {**keep, **{int(k[1:]): kept for k, kept in changes.items()}}, "structural")


def positions(units: tuple[int, ...], block: int) -> tuple[int, ...]:
    return tuple(unit * block + i for unit in units for i in range(block))


def test_masked_heads_are_zeroed_where_they_are_read_and_made(base: Checkpoint, tmp_path: Path) -> None:
    plan = head_plan(base, {0: (0, 2, 3, 4, 5, 6, 7), 2: tuple(range(8)), 5: (1,)}, "mask")
    gone = positions((0, 2, 3, 4, 5, 6, 7), 16)
    edits = edits_for(plan, base)
    assert edits == {
        f"{PREFIX}0.self_attn.q_proj.weight": Mask(0, tuple(range(8, 16))),
        f"{PREFIX}0.self_attn.o_proj.weight": Mask(1, tuple(range(8, 16))),
        f"{PREFIX}5.self_attn.q_proj.weight": Mask(0, gone),
        f"{PREFIX}5.self_attn.o_proj.weight": Mask(1, gone),
    }
    assert edits_for(dataclasses.replace(plan, params={}), base) == edits  # a plan by hand need not say mask
    manifest = cut(base, plan, tmp_path / "out")
    assert manifest.config_changes == {}
    assert manifest.size_bytes_after == manifest.size_bytes_before
    out = open_checkpoint(tmp_path / "out")
    facts = {f.name: f for f in manifest.tensors if f.found != "same"}
    assert {name: (f.found, f.axis, f.index) for name, f in facts.items()} == {
        name: ("mask", edit.axis, edit.index) for name, edit in edits.items() if isinstance(edit, Mask)
    }
    for name in edits:
        before, after = (c.read(name).view("<u2").reshape(c.ref(name).shape) for c in (base, out))
        edit = edits[name]
        assert isinstance(edit, Mask)
        expected = before.copy()
        expected[(slice(None),) * edit.axis + (list(edit.index),)] = 0
        assert np.array_equal(after, expected)
    assert verify_cut(out, base, plan).layers_changed == (0, 5)
    less = dataclasses.replace(plan, layers={0: plan.layers[0]})
    with pytest.raises(CheckpointError, match="touches 1 layers, bytes differ in 2"):
        verify_cut(out, base, less)


def test_structural_takes_the_same_heads_everywhere(base: Checkpoint, tmp_path: Path) -> None:
    plan = structural(base)
    edits = edits_for(plan, base)
    assert len(edits) == 5 * 4 + 3
    assert edits[f"{PREFIX}0.self_attn.q_proj.weight"] == Take(0, positions(WHOLE, 8))
    assert edits[f"{PREFIX}0.self_attn.o_proj.weight"] == Take(1, positions(WHOLE, 8))
    assert edits[f"{PREFIX}0.self_attn.k_proj.weight"] == Take(0, positions((0, 2, 3), 8))
    assert edits[f"{PREFIX}0.self_attn.v_proj.weight"] == Take(0, positions((0, 2, 3), 8))
    assert edits[f"{PREFIX}5.self_attn.q_proj.weight"] == Take(0, positions(THIN, 16))
    assert edits[f"{PREFIX}5.self_attn.o_proj.weight"] == Take(1, positions(THIN, 16))
    assert edits[f"{PREFIX}5.self_attn.k_proj.weight"] == Take(0, positions((0, 1), 16))
    manifest = cut(base, plan, tmp_path / "out")
    assert manifest.config_changes == {
        "text_config.num_attention_heads": (8, 6), "text_config.num_key_value_heads": (4, 3),
    }  # fmt: skip
    out = open_checkpoint(tmp_path / "out")
    report = verify_cut(out, base, plan)
    assert report.layers_changed == (0, 1, 2, 3, 4, 5)
    assert report.tensors_changed == 5 * 4 + 2  # the full layer keeps its KV heads
    found = {f.name: f for f in report.manifest.tensors}
    for name, edit in edits.items():
        assert isinstance(edit, Take)
        if name.endswith("5.self_attn.k_proj.weight"):
            assert found[name].found == "same"
        else:
            assert (found[name].found, found[name].axis, found[name].index) == ("take", edit.axis, edit.index)
    assert [site.units for site in out.sites] == [6] * 6
    with pytest.raises(CheckpointError, match="not as planned"):
        verify_cut(out, base, structural(base, _2=(0, 1, 2, 3, 6, 7)))


@pytest.mark.parametrize("mode", ["mask", "structural"])
def test_keeping_every_head_gives_the_same_bytes(base: Checkpoint, tmp_path: Path, mode: str) -> None:
    plan = head_plan(base, dict.fromkeys(range(6), tuple(range(8))), mode)
    manifest = cut(base, plan, tmp_path / "out")
    assert {fact.found for fact in manifest.tensors} == {"same"}
    assert manifest.config_changes == {}
    for path in base.path.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# ---------------------------------------------------------------- plans that do not fit


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        ((0, 1, 2, 4, 6, 7), "another KV head"),
        ((0, 1, 2, 3), "same number of query heads"),
        (tuple(range(8)), "same number of query heads"),
        ((0, 1, 4, 5, 6, 8), "does not exist"),
        ((), "keeps nothing"),
    ],
)
def test_structural_plans_edited_by_hand(base: Checkpoint, tmp_path: Path, keep: tuple[int, ...], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        cut(base, structural(base, _3=keep), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_uneven_plan_is_no_trouble_as_a_mask(base: Checkpoint) -> None:
    plan = dataclasses.replace(structural(base, _3=(0, 1, 2, 4, 6, 7)), params={"mode": "mask"})
    assert len(edits_for(plan, base)) == 12


def test_a_structural_plan_names_every_layer(base: Checkpoint) -> None:
    plan = structural(base)
    less = dataclasses.replace(plan, layers={k: v for k, v in plan.layers.items() if k != 4})
    with pytest.raises(UsageError, match="must name every layer") as caught:
        check_plan(less, base)
    assert caught.value.where == "layer 4"
    check_plan(less, base, gguf=True)  # which a GGUF file need not


def test_a_mode_that_does_not_exist(base: Checkpoint) -> None:
    for check in (check_plan, edits_for):
        with pytest.raises(UsageError, match="no such way to drop heads"):
            check(head_plan(base, {0: WHOLE}, "reshape"), base)


@pytest.mark.parametrize("mode", ["mask", "structural"])
def test_a_plan_for_another_checkpoint(base: Checkpoint, mode: str) -> None:
    plan = dataclasses.replace(structural(base), params={"mode": mode})
    with pytest.raises(CheckpointError, match="another checkpoint"):
        check_plan(dataclasses.replace(plan, model_fingerprint="0" * 64), base)
    layers = {layer: layer_plan(WHOLE, 9) for layer in range(6)}
    with pytest.raises(CheckpointError, match="another number of heads"):
        check_plan(dataclasses.replace(plan, units=9, layers=layers), base)
    with pytest.raises(CheckpointError, match="disagree about the layers"):
        check_plan(dataclasses.replace(plan, layers={**plan.layers, 6: layer_plan(WHOLE)}), base)


def test_kv_projections_of_another_size(base: Checkpoint, tmp_path: Path) -> None:
    """The config says 4 KV heads, the weights have 8."""
    wide = dataclasses.replace(SMALL, kv_heads=8)
    synthetic.write(tmp_path / "wide", layers=6, geometry=wide, shard_bytes=20_000)
    (tmp_path / "wide/config.json").write_bytes((base.path / "config.json").read_bytes())
    other = open_checkpoint(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="disagree about the number of KV heads") as caught:
        edits_for(structural(other), other)
    assert "0.self_attn.k_proj" in str(caught.value)


# ---------------------------------------------------------------- 31B, headers alone


@pytest.fixture(scope="module")
def base_31b(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("31b") / "base"
    synthetic.write(folder, layers=synthetic.DENSE_31B_LAYERS, geometry=synthetic.DENSE_31B, sparse=True)
    return open_checkpoint(folder)


def shapes_of(base: Checkpoint) -> dict[int, Attention]:
    family = base.family
    return {site.layer: family.attention(base.text_config, base.tensors, site.layer) for site in base.sites}


def scores_for(base: Checkpoint) -> Scores:
    values = np.random.default_rng(0).standard_normal((60, 32))
    return Scores("loo", {}, "heads", tuple(range(60)), values, base.fingerprint, "s", "c")


def test_31b_at_24_heads(base_31b: Checkpoint) -> None:
    shapes = shapes_of(base_31b)
    assert {(one.heads, one.kv_heads, one.head_dim) for one in shapes.values()} == {(32, 16, 256), (32, 4, 512)}
    plan = plan_heads(scores_for(base_31b), shapes, drop=0.25, mode="structural").plan
    edits = edits_for(plan, base_31b)
    after = {name: edited(base_31b.ref(name), edit) for name, edit in edits.items()}
    assert len(after) == 50 * 4 + 10 * 3
    for one in shapes.values():
        q, k, o = (after[name].shape for name in (one.q, one.k, one.o))  # type: ignore[union-attr]
        if one.full:
            assert one.v is None
            assert (q, k, o) == ((24 * 512, 5376), (4 * 512, 5376), (5376, 24 * 512))
        else:
            assert after[one.v or ""].shape == k  # type: ignore[union-attr]
            assert (q, k, o) == ((24 * 256, 5376), (12 * 256, 5376), (5376, 24 * 256))
    new = config_for(plan, base_31b)["text_config"]
    old = base_31b.text_config
    assert isinstance(new, dict)
    assert {key: new[key] for key in new if new[key] != old[key]} == {
        "num_attention_heads": 24, "num_key_value_heads": 12,
    }  # fmt: skip
    assert new["num_global_key_value_heads"] == 4


def test_31b_at_28_heads_masked_in_four_layers(base_31b: Checkpoint) -> None:
    plan = plan_heads(scores_for(base_31b), shapes_of(base_31b), drop=0.125, layers=(0, 1, 2, 3)).plan
    edits = edits_for(plan, base_31b)
    assert len(edits) == 8
    assert all(isinstance(edit, Mask) and len(edit.index) == 4 * 256 for edit in edits.values())
    assert config_for(plan, base_31b) == base_31b.config
