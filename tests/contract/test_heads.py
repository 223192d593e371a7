"""What a head cut must keep, in stock transformers.

1. masked heads: the logits equal the base with those heads' outputs zeroed, to the bit
2. structural: they equal it up to rounding, and the cut loads with no missing, unexpected or mismatched key
3. an identity plan gives the same bytes
4. the manifest is the plan, and a flipped byte is caught by name
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.stock import a_flipped_byte_is_caught, load, logits, same_bytes, speaks

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.families.base import Attention
from gemcut.families.heads import HeadMode
from gemcut.plan import plan_heads
from gemcut.surgery import cut, edits_for, verify_cut
from gemcut.types import Mask, Plan, Scores, Take
from tiny import make_tiny

DEMO_DENSE = Path(__file__).parents[2] / "demo" / "dense"
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
# kind, config, heads dropped by a structural cut
BASES = {
    "dense": ("dense", {}, 2),  # 4 query heads on 2 and on 1 KV head: thinned
    "dense-text": ("dense-text", {}, 2),
    "moe": ("moe", {}, 2),
    "dense-8": ("dense", EIGHT, 2),  # 6 on 4 KV heads is no integer: a KV head goes; 6 on 2 is thinned
    "dense-text-8": ("dense-text", EIGHT, 6),  # 2 heads: 1 of 4 KV heads stays; 1 each on 2
    "moe-8": ("moe", EIGHT, 2),
    "dense-v": ("dense", {**EIGHT, "attention_k_eq_v": False}, 2),  # full layers with v_proj and the common KV count
}
MODES = ("mask", "structural")


@pytest.fixture(scope="module", params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(name: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    kind, overrides, _ = BASES[name]
    folder = tmp_path_factory.mktemp("contract") / name
    return open_checkpoint(make_tiny(folder, kind, seed=5, dtype="float32", **overrides))  # type: ignore[arg-type]


def shapes_of(base: Checkpoint) -> dict[int, Attention]:
    layers = [site.layer for site in base.sites if site.kind == "heads"]
    return {layer: base.family.attention(base.text_config, base.tensors, layer) for layer in layers}


def a_plan(base: Checkpoint, drop: int, mode: HeadMode, seed: int = 0) -> Plan:
    """Other heads in every layer."""
    shapes = shapes_of(base)
    values = np.random.default_rng(seed).standard_normal((len(shapes), shapes[0].heads))
    scores = Scores("random", {}, "heads", tuple(shapes), values, base.fingerprint, "s", "c")
    return plan_heads(scores, shapes, drop=drop, mode=mode).plan


@pytest.fixture(scope="module", params=MODES)
def the_cut(
    request: pytest.FixtureRequest, name: str, base: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Plan]:
    drop = BASES[name][2] if request.param == "structural" else 1
    plan = a_plan(base, drop, request.param)
    out = tmp_path_factory.mktemp("cut") / "out"
    cut(base, plan, out)
    return open_checkpoint(out), plan


def silence(model: Any, base: Checkpoint, plan: Plan) -> None:
    """Zero the outputs of the dropped heads just before o_proj reads them."""
    for layer, module in enumerate(model.get_decoder().layers):
        width = shapes_of(base)[layer].head_dim
        drop = sorted(plan.layers[layer].drop)

        def hook(_m: Any, args: tuple[torch.Tensor], drop: list[int] = drop, width: int = width) -> tuple[torch.Tensor]:
            heads = args[0].unflatten(-1, (-1, width)).clone()
            heads[..., drop, :] = 0
            return (heads.flatten(-2),)

        module.self_attn.o_proj.register_forward_pre_hook(hook)


def test_dropping_equals_silencing(base: Checkpoint, the_cut: tuple[Checkpoint, Plan]) -> None:
    out, plan = the_cut
    whole = load(base)
    untouched = logits(whole)
    silence(whole, base, plan)
    silent = logits(whole)
    dropped = logits(load(out))
    assert (silent - untouched).abs().max().item() > 1e-3  # the cut is not nothing
    difference = (dropped - silent).abs().max().item()
    if plan.params["mode"] == "mask":
        assert difference == 0.0
    else:
        assert difference <= 1e-5


@pytest.mark.parametrize(("mode", "drop"), [("mask", 1), ("structural", 2)])
def test_dropping_equals_silencing_in_a_trained_model(tmp_path: Path, mode: HeadMode, drop: int) -> None:
    base = open_checkpoint(DEMO_DENSE)
    plan = a_plan(base, drop, mode)
    cut(base, plan, tmp_path / "out")
    whole = load(base)
    untouched = logits(whole)
    silence(whole, base, plan)
    silent = logits(whole)
    difference = (logits(load(open_checkpoint(tmp_path / "out"))) - silent).abs().max().item()
    assert (silent - untouched).abs().max().item() > 0.1
    # other sums of the same numbers: a few units in the last place of logits up to 30
    assert difference == 0.0 if mode == "mask" else difference <= 1e-6 * silent.abs().max().item()


def test_zero_queries_alone_would_not_remove_a_head(base: Checkpoint, tmp_path: Path) -> None:
    """Why o_proj is masked too: a head without a query attends evenly and leaves the mean of V."""
    from gemcut.checkpoint.write import write_checkpoint

    plan = a_plan(base, 1, "mask")
    edits = edits_for(plan, base)
    queries = {name: edit for name, edit in edits.items() if ".q_proj." in name}
    write_checkpoint(base, queries, base.config, tmp_path / "out")
    whole = load(base)
    silence(whole, base, plan)
    assert (logits(load(open_checkpoint(tmp_path / "out"))) - logits(whole)).abs().max().item() > 1e-3


def test_loads_in_stock_transformers(name: str, base: Checkpoint, the_cut: tuple[Checkpoint, Plan]) -> None:
    out, plan = the_cut
    model = load(out)
    heads = shapes_of(base)[0].heads
    kept = heads - (BASES[name][2] if plan.params["mode"] == "structural" else 0)
    assert model.config.get_text_config().num_attention_heads == kept
    speaks(model)


def test_a_cache_gives_the_same_logits(the_cut: tuple[Checkpoint, Plan]) -> None:
    model = load(the_cut[0])
    ids = torch.randint(10, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]
    assert (whole - step).abs().max().item() <= 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_identity_plan_gives_the_same_bytes(base: Checkpoint, tmp_path: Path, mode: HeadMode) -> None:
    cut(base, a_plan(base, 0, mode), tmp_path / "out")
    same_bytes(base.path, tmp_path / "out")


def test_the_manifest_is_the_plan(base: Checkpoint, the_cut: tuple[Checkpoint, Plan]) -> None:
    out, plan = the_cut
    manifest = verify_cut(out, base, plan).manifest
    facts = {fact.name: fact for fact in manifest.tensors}
    meant = {}
    for name, edit in edits_for(plan, base).items():
        assert isinstance(edit, Take | Mask)
        if isinstance(edit, Mask) or len(edit.index) != base.ref(name).shape[edit.axis]:
            meant[name] = (type(edit).__name__.lower(), edit.axis, edit.index)
    changed = {name: (fact.found, fact.axis, fact.index) for name, fact in facts.items() if fact.found != "same"}
    assert changed == meant
    assert not any("norm" in name for name in changed)
    keys = {key.split(".")[-1] for key in manifest.config_changes}
    assert keys <= {"num_attention_heads", "num_key_value_heads", "num_global_key_value_heads"}
    assert ("num_attention_heads" in keys) == (plan.params["mode"] == "structural")


@pytest.mark.parametrize("seed", range(2))
def test_a_flipped_byte_is_caught(base: Checkpoint, the_cut: tuple[Checkpoint, Plan], seed: int) -> None:
    out, plan = the_cut
    # once anywhere, once in a tensor that the cut wrote
    edits = edits_for(plan, base)
    flipped = [ref for ref in out.tensors.values() if ref.size_bytes and (seed or ref.name in edits)]
    a_flipped_byte_is_caught(out, base, plan, flipped, seed)
