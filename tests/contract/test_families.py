"""What every family must keep: four contracts, run on a tiny checkpoint of each kind and in stock transformers.

1. an identity plan gives the same bytes
2. dropping experts equals masking their router logits in the base: the logits agree to the bit
3. the cut loads in stock transformers with no missing, unexpected or mismatched key
4. the manifest is the plan, and a flipped byte is caught by name
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.stock import a_flipped_byte_is_caught, load, logits, same_bytes, speaks

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.families import ARCHITECTURES, family_of
from gemcut.surgery import cut, verify_cut
from gemcut.types import LayerPlan, Plan
from tiny import make_tiny

KINDS = ["moe", "moe-text"]  # the wrapper and the bare decoder: other names on disk, the same modules
KEEP = 5
DEMO_MOE = Path(__file__).parents[2] / "demo" / "moe"


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("contract") / request.param
    return open_checkpoint(make_tiny(folder, request.param, seed=3, dtype="float32"))


def a_plan(base: Checkpoint, keep: int, seed: int = 0) -> Plan:
    """Another set of experts in every layer."""
    rng = random.Random(seed)
    layers = {}
    units = 0
    for site in base.sites:
        if site.kind == "experts":
            units = site.units
            kept = tuple(sorted(rng.sample(range(units), keep)))
            layers[site.layer] = LayerPlan(kept, {u: "test" for u in range(units) if u not in kept})
    return Plan("experts", base.fingerprint, units, layers)


@pytest.fixture(scope="module")
def the_cut(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Plan]:
    plan = a_plan(base, KEEP)
    out = tmp_path_factory.mktemp("cut") / "out"
    cut(base, plan, out)
    return open_checkpoint(out), plan


def mask_routers(model: Any, base: Checkpoint, plan: Plan) -> int:
    """Put −∞ on the router logits of the dropped experts; return how many routers were found."""
    masked = 0
    for name, module in model.named_modules():
        if not name.endswith("router.proj"):
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        drop = sorted(plan.layers[layer].drop)

        def hook(_m: Any, _args: Any, logits: torch.Tensor, drop: list[int] = drop) -> torch.Tensor:
            logits = logits.clone()
            logits[..., drop] = float("-inf")
            return logits

        module.register_forward_hook(hook)
        masked += 1
    return masked


def test_every_architecture_has_a_family() -> None:
    for architecture in ARCHITECTURES:
        assert family_of({"architectures": [architecture]}).renormalises, "contract 2 needs a renormalising router"


def test_identity_plan_gives_the_same_bytes(base: Checkpoint, tmp_path: Path) -> None:
    cut(base, a_plan(base, 8), tmp_path / "out")
    same_bytes(base.path, tmp_path / "out")


def test_dropping_equals_masking_the_router_to_the_bit(base: Checkpoint, the_cut: tuple[Checkpoint, Plan]) -> None:
    out, plan = the_cut
    whole = load(base)
    untouched = logits(whole)
    assert mask_routers(whole, base, plan) == len(plan.layers)
    masked = logits(whole)
    dropped = logits(load(out))
    assert (dropped - masked).abs().max().item() == 0.0
    assert (dropped - untouched).abs().max().item() > 1e-3  # the cut is not nothing


def test_dropping_equals_masking_in_a_trained_model(tmp_path: Path) -> None:
    """32 → 16 experts of the demo checkpoint. The base's kept experts are sorted to the front, so that its softmax
    adds the same numbers in the same order as the cut's."""
    base = open_checkpoint(DEMO_MOE)
    plan = a_plan(base, 16)
    cut(base, plan, tmp_path / "out")
    whole, dropped = load(base), load(open_checkpoint(tmp_path / "out"))
    first = {}
    with torch.no_grad():
        for layer, module in enumerate(whole.get_decoder().layers):
            kept = plan.layers[layer].keep
            order = torch.tensor([*kept, *sorted(set(range(plan.units)) - set(kept))])
            experts, router = module.experts, module.router
            for tensor in (
                experts.gate_up_proj,
                experts.down_proj,
                router.proj.weight,
                router.per_expert_scale,
            ):
                tensor.copy_(tensor[order].clone())
            drop = dict.fromkeys(range(16, plan.units), "")
            first[layer] = LayerPlan(tuple(range(16)), drop)
        assert mask_routers(whole, base, Plan("experts", base.fingerprint, plan.units, first)) == len(plan.layers)
        ids = torch.randint(300, 4000, (2, 200), generator=torch.Generator().manual_seed(0))
        a, b = (model(input_ids=ids, use_cache=False).logits for model in (whole, dropped))
    assert (a - b).abs().max().item() == 0.0


def test_loads_in_stock_transformers(the_cut: tuple[Checkpoint, Plan]) -> None:
    out, _ = the_cut
    model = load(out)
    assert model.config.get_text_config().num_experts == KEEP
    speaks(model)


def test_the_manifest_is_the_plan(base: Checkpoint, the_cut: tuple[Checkpoint, Plan]) -> None:
    out, plan = the_cut
    manifest = verify_cut(out, base, plan).manifest
    touched = {cut.name: plan.layers[s.layer].keep for s in base.sites if s.kind == "experts" for cut in s.slices}
    facts = {fact.name: fact for fact in manifest.tensors}
    assert {name for name, fact in facts.items() if fact.found != "same"} == set(touched)
    for name, keep in touched.items():
        assert (facts[name].found, facts[name].axis, facts[name].index) == ("take", 0, keep)
    assert [key.split(".")[-1] for key in manifest.config_changes] == ["num_experts"]


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_is_caught(base: Checkpoint, the_cut: tuple[Checkpoint, Plan], seed: int) -> None:
    out, plan = the_cut
    flipped = [ref for ref in out.tensors.values() if ref.size_bytes]
    a_flipped_byte_is_caught(out, base, plan, flipped, seed)
