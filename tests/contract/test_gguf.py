"""What a GGUF file of a model must keep, in the pinned library.

1. its logits are the model's in stock transformers, up to rounding: dense, MoE, bare and wrapped, and the demo trunks
2. after a cut of experts or heads the same, and a file cut on the way has the bytes of the file of the cut folder
3. other numbers of heads in every layer, which no folder can hold: the logits of the model with those heads silenced
4. a drafter and a vision tower are files that read back with the bytes of the checkpoint
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.stock import load
from transformers import AutoModelForCausalLM

from gemcut import exporting
from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.layout import layout_of, vision_layout_of
from gemcut.families.heads import kv_heads_after
from gemcut.ggml.model import Model
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import read_gguf
from gemcut.records import save_plan
from gemcut.surgery import cut, cut_for_gguf, edits_for
from gemcut.types import F32, LayerPlan, Mask, Plan
from gguf_facts import values_of
from tiny import Kind, add_vision, make_drafter, make_tiny

DEMO = Path(__file__).parents[2] / "demo"
# llama.cpp keeps K and V in 16 bits and looks GELU up in a table: about 2e-4 of noise, which the random tiny models
# carry on to 1e-2 in logits. A wrong head or expert shows at hundreds of times this.
NOISE = 3e-5  # KL divergence, nats per token
WORDS = 300  # ids from here on stand for pictures and sound in the wrapper
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
KINDS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "moe": ("moe", {}),
    "dense-text-8": ("dense-text", EIGHT),
    "dense-v": ("dense", {**EIGHT, "attention_k_eq_v": False}),  # full layers with a v_proj
    "no cap": ("moe-text", {"final_logit_softcapping": None}),
}


def written(base: Checkpoint, out: Path, kind: str = "F32", projector: str = "") -> Path:
    """The model file, or the mmproj."""
    words = exporting.GgufWords(() if projector else (kind,), projectors=(projector,) if projector else ())
    (export,) = exporting.plan_export(base, words)
    exporting.write_export((export,), out, threads=1)
    return out / export.planned[0].target.name


def tokens(vocabulary: int, count: int = 60) -> list[int]:
    return [2, *np.random.default_rng(0).integers(0, vocabulary, count - 1).tolist()]


def of_file(path: Path, ids: list[int]) -> F32:
    with Model(path, threads=1) as model:
        assert len(model.generate(ids[:8], 8, stop=False)) == 8
        return model.logits(ids).copy()


def of_transformers(model: Any, ids: list[int]) -> F32:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].float())


def kld_nats(base: F32, other: F32) -> float:
    """Mean KL divergence per token, float64."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (base, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def silence(model: Any, base: Checkpoint, plan: Plan) -> None:
    """Zero what the dropped heads give to o_proj."""
    for layer, one in plan.layers.items():
        width = base.family.attention(base.text_config, base.tensors, layer).head_dim

        def hook(_m: Any, args: tuple[torch.Tensor], one: LayerPlan = one, width: int = width) -> tuple[torch.Tensor]:
            heads = args[0].unflatten(-1, (-1, width)).clone()
            heads[..., sorted(one.drop), :] = 0
            return (heads.flatten(-2),)

        model.get_decoder().layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)


def ragged_plan(base: Checkpoint, seed: int = 0) -> Plan:
    """Another legal number of heads in every layer, some layers left whole."""
    rng = np.random.default_rng(seed)
    layers = {}
    units = 0
    for site in base.sites:
        if site.kind != "heads":
            continue
        one = base.family.attention(base.text_config, base.tensors, site.layer)
        units = one.heads
        count = int(rng.choice([m for m in range(1, units + 1) if kv_heads_after(one, m) is not None]))
        kv = kv_heads_after(one, count)
        assert kv is not None
        groups = np.arange(units).reshape(one.kv_heads, one.group)
        if kv == one.kv_heads:
            keep = [int(h) for row in groups for h in sorted(rng.choice(row, count // kv, replace=False))]
        else:
            keep = [int(h) for j in sorted(rng.choice(one.kv_heads, kv, replace=False)) for h in groups[j]]
        if len(keep) < units:
            layers[site.layer] = LayerPlan(tuple(keep), {h: "test" for h in range(units) if h not in keep})
    assert layers
    assert len({len(one.keep) for one in layers.values()} | {units}) > 1
    return Plan("heads", base.fingerprint, units, layers, params={"mode": "structural"})


def experts_plan(base: Checkpoint, keep: int) -> Plan:
    rng = np.random.default_rng(1)
    units = base.family.top_k(base.text_config)
    layers = {}
    for site in base.sites:
        if site.kind == "experts":
            units = site.units
            kept = tuple(sorted(int(e) for e in rng.choice(units, keep, replace=False)))
            layers[site.layer] = LayerPlan(kept, {e: "test" for e in range(units) if e not in kept})
    return Plan("experts", base.fingerprint, units, layers)


def uniform_plan(base: Checkpoint, drop: int) -> Plan:
    """The last query heads of every KV head, in every layer."""
    layers = {}
    units = 0
    for site in base.sites:
        if site.kind == "heads":
            one = base.family.attention(base.text_config, base.tensors, site.layer)
            units, lost = one.heads, drop // one.kv_heads
            gone = {h: "test" for h in range(units) if h % one.group >= one.group - lost}
            layers[site.layer] = LayerPlan(tuple(h for h in range(units) if h not in gone), gone)
    return Plan("heads", base.fingerprint, units, layers, params={"mode": "structural"})


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    kind, overrides = KINDS[request.param]
    folder = tmp_path_factory.mktemp("gguf") / kind
    return open_checkpoint(make_tiny(folder, kind, seed=7, dtype="float32", **overrides))


def test_logits_are_the_models(tiny: Checkpoint, tmp_path: Path) -> None:
    ids = tokens(WORDS)
    assert kld_nats(of_transformers(load(tiny), ids), of_file(written(tiny, tmp_path), ids)) <= NOISE


def test_other_numbers_of_heads_in_every_layer(tiny: Checkpoint, tmp_path: Path) -> None:
    ids = tokens(WORDS)
    plan = ragged_plan(tiny)
    with pytest.raises(UsageError, match="gemcut gguf --plan"):
        cut(tiny, plan, tmp_path / "cut")
    file = written(cut_for_gguf(tiny, plan), tmp_path)
    counts = read_gguf(file).metadata["gemma4.attention.head_count"]
    assert counts.kind == "i32"
    assert counts.value == tuple(len(plan.layers[i].keep) if i in plan.layers else plan.units for i in range(6))
    whole = load(tiny)
    untouched = of_transformers(whole, ids)
    silence(whole, tiny, plan)
    silent = of_transformers(whole, ids)
    assert kld_nats(untouched, silent) > 300 * NOISE
    assert kld_nats(silent, of_file(file, ids)) <= NOISE


@pytest.mark.parametrize("what", ["experts", "heads"])
def test_cut_on_the_way_is_the_cut_folder(what: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base", "moe", dtype="float32", **EIGHT)
    base = open_checkpoint(folder)
    plan = experts_plan(base, 5) if what == "experts" else uniform_plan(base, 4)
    save_plan(plan, tmp_path / "plan.json")
    cut(base, plan, tmp_path / "cut")
    ids = tokens(WORDS)
    through = read_gguf(written(exporting.after_plan(base, tmp_path / "plan.json"), tmp_path / "a", "Q8_0"))
    after = read_gguf(written(open_checkpoint(tmp_path / "cut"), tmp_path / "b", "Q8_0"))
    assert list(through.tensors) == list(after.tensors)
    for name in after.tensors:
        ours, theirs = through.ref(name), after.ref(name)
        assert (ours.kind, ours.shape) == (theirs.kind, theirs.shape)
        assert through.read(name).tobytes() == after.read(name).tobytes(), name
    own = ("general.name", "general.finetune", "general.basename", "gemcut.")
    same = [{k: v for k, v in f.metadata.items() if not k.startswith(own)} for f in (through, after)]
    assert same[0] == same[1]
    assert through.metadata["gemcut.parent.fingerprint"].value == base.fingerprint
    assert "gemcut.cut.fingerprint" in through.metadata
    assert "gemcut.cut.fingerprint" not in after.metadata
    folder_cut = open_checkpoint(tmp_path / "cut")
    assert kld_nats(of_transformers(load(folder_cut), ids), of_file(written(folder_cut, tmp_path / "c"), ids)) <= NOISE


def test_a_masked_plan_keeps_its_shapes(tmp_path: Path) -> None:
    base = open_checkpoint(make_tiny(tmp_path / "base", "dense", dtype="float32"))
    ragged = ragged_plan(base)
    plan = Plan("heads", base.fingerprint, ragged.units, ragged.layers, params={"mode": "mask"})
    found = cut_for_gguf(base, plan)
    edits = edits_for(plan, base)
    assert all(isinstance(edit, Mask) for edit in edits.values())
    assert {n: r.shape for n, r in found.tensors.items()} == {n: r.shape for n, r in base.tensors.items()}
    cut(base, plan, tmp_path / "cut")
    written_cut = open_checkpoint(tmp_path / "cut")
    for name in edits:
        assert found.read(name).tobytes() == written_cut.read(name).tobytes()


def test_query_heads_that_would_change_their_kv_head_are_refused_here_too(tmp_path: Path) -> None:
    base = open_checkpoint(make_tiny(tmp_path / "base", "dense", dtype="float32"))
    bad = Plan("heads", base.fingerprint, 4, {0: LayerPlan((0, 1, 2), {3: "test"})}, params={"mode": "structural"})
    with pytest.raises(UsageError, match="another KV head"):
        cut_for_gguf(base, bad)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        cut_for_gguf(base, Plan("heads", "0" * 64, 4, bad.layers, params={"mode": "structural"}))


@pytest.mark.parametrize("which", ["drafter", "tower"])
def test_drafter_and_tower_hold_the_checkpoints_values(which: str, tmp_path: Path) -> None:
    if which == "drafter":
        base = open_checkpoint(make_drafter(tmp_path / "drafter"), any_architecture=True)
        file, layout = written(base, tmp_path, "BF16"), layout_of(base)
    else:
        base = open_checkpoint(add_vision(make_tiny(tmp_path / "moe", "moe")))
        file, layout = written(base, tmp_path, projector="BF16"), vision_layout_of(base)
    found = read_gguf(file)
    assert sorted(found.tensors) == sorted(tensor.name for tensor in layout.tensors)
    for tensor in layout.tensors:
        ref = found.ref(tensor.name)
        assert ref.shape == tensor.shape
        assert ref.kind is (GgmlType.F32 if tensor.keep_f32 else GgmlType.BF16), tensor.name
        raw = found.read(tensor.name)
        stored = raw.view("<f4") if tensor.keep_f32 else (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(stored.reshape(tensor.shape), values_of(base, tensor)), tensor.name


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["dense", "moe"])
def test_the_demo_trunks_bf16_noise_and_nothing_else(demo: str, tmp_path: Path) -> None:
    """F32: see NOISE; trained weights carry less of it on. BF16: the activations are rounded to bfloat16, too, which
    costs transformers more when it does so, as it rounds the residual stream as well."""
    base = open_checkpoint(DEMO / demo)
    ids = tokens(4096, 200)
    theirs = of_transformers(load(base), ids)
    half = of_transformers(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16), ids)
    assert kld_nats(theirs, of_file(written(base, tmp_path), ids)) <= NOISE / 10
    assert kld_nats(theirs, of_file(written(base, tmp_path, "BF16"), ids)) <= kld_nats(theirs, half)
    plan = experts_plan(base, 24) if demo == "moe" else ragged_plan(base)
    file = written(cut_for_gguf(base, plan), tmp_path)
    if demo == "moe":
        cut(base, plan, tmp_path / "cut")
        model = load(open_checkpoint(tmp_path / "cut"))
    else:
        model = load(base)
        silence(model, base, plan)
    assert kld_nats(of_transformers(model, ids), of_file(file, ids)) <= NOISE / 10
