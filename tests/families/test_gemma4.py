"""The facts of the family, held against what transformers builds from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemcut.errors import CheckpointError, UsageError
from gemcut.families import ARCHITECTURES, family_names, family_of
from gemcut.families.base import COMPONENTS
from gemcut.families.gemma4 import FAMILY, head_dim, sites, text_config
from gemcut.types import LayerPlan, Plan
from tiny import full_config, make_tiny


def plan(keep: dict[int, tuple[int, ...]], units: int = 8) -> Plan:
    layers = {
        layer: LayerPlan(kept, {u: "test" for u in range(units) if u not in kept}) for layer, kept in keep.items()
    }
    return Plan("experts", "f" * 64, units, layers)


def test_map_names_modules_that_exist() -> None:
    for architecture in ARCHITECTURES:
        family = family_of({"architectures": [architecture]})
        assert architecture in family.architectures
        assert family.name in family_names()


@pytest.mark.parametrize(
    "config", [{}, {"architectures": []}, {"architectures": ["LlamaForCausalLM"]}, {"architectures": 3}]
)
def test_unknown_architecture_says_which_exist(config: dict) -> None:
    with pytest.raises(UsageError) as caught:
        family_of(config)
    assert "gemma4" in str(caught.value)
    assert "Gemma4ForConditionalGeneration" in str(caught.value)


@pytest.mark.parametrize("kind", ["moe", "dense", "moe-text", "dense-text"])
def test_sites_fit_the_tensors(tmp_path: Path, kind: str) -> None:
    from gemcut.checkpoint.read import open_checkpoint

    checkpoint = open_checkpoint(make_tiny(tmp_path / kind, kind))
    found = sites(checkpoint.text_config, checkpoint.tensors)
    assert len(found) == (12 if kind.startswith("moe") else 6)
    for site in found:
        for part in site.slices:
            assert checkpoint.tensors[part.name].shape[part.axis] == site.units * part.block
    assert {FAMILY.component(name) for name in checkpoint.tensors} <= set(COMPONENTS) - {"other"}


@pytest.mark.parametrize("kind", ["moe", "dense", "moe-text", "dense-text"])
def test_attention_fits_the_tensors(tmp_path: Path, kind: str) -> None:
    from gemcut.checkpoint.read import open_checkpoint

    checkpoint = open_checkpoint(make_tiny(tmp_path / kind, kind))
    hidden = checkpoint.text_config["hidden_size"]
    for layer in range(6):
        one = FAMILY.attention(checkpoint.text_config, checkpoint.tensors, layer)
        assert one.full == (layer == 5)
        assert checkpoint.tensors[one.q].shape == (one.heads * one.head_dim, hidden)
        assert checkpoint.tensors[one.k].shape == (one.kv_heads * one.head_dim, hidden)
        assert checkpoint.tensors[one.o].shape == (hidden, one.heads * one.head_dim)
        assert one.group * one.kv_heads == one.heads
        values = [name for name in checkpoint.tensors if f"layers.{layer}.self_attn.v_proj" in name]
        assert values == ([] if one.v is None else [one.v])


def test_head_dim_of_both_config_forms() -> None:
    text = dict(text_config(full_config("dense")))
    assert [head_dim(text, i) for i in (0, 5)] == [16, 32]
    rewritten = {k: v for k, v in text.items() if not k.startswith("global_")}
    rewritten["per_layer_config"] = {"5": {"head_dim": 32}}
    assert [head_dim(rewritten, i) for i in (0, 5)] == [16, 32]


def test_shrink_changes_one_key() -> None:
    config = full_config("moe")
    new = FAMILY.shrink(config, plan(dict.fromkeys(range(6), (0, 1, 2, 5))))
    assert new["text_config"]["num_experts"] == 4
    new["text_config"]["num_experts"] = 8
    assert new == config
    assert list(new) == list(config)


def test_shrink_refuses_what_the_format_cannot_say() -> None:
    with pytest.raises(UsageError, match="same number of experts"):
        FAMILY.shrink(full_config("moe"), plan({0: (0, 1), 1: (0, 1, 2)}))
    with pytest.raises(UsageError, match="fewer experts than the router selects") as caught:
        FAMILY.shrink(full_config("moe"), plan({0: (0,), 1: (3,)}))
    assert "top_k_experts = 2" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "6"),
        ("layer_types", ["sliding_attention"]),
        ("num_attention_heads", True),
        ("layer_types", ["odd"] * 6),
        ("num_experts", -1),
    ],
)
def test_config_that_lies_is_a_checkpoint_error(tmp_path: Path, key: str, value: object) -> None:
    text = dict(text_config(full_config("moe")))
    text[key] = value
    names = [f"model.language_model.layers.{i}.input_layernorm.weight" for i in range(6)]
    with pytest.raises(CheckpointError):
        sites(text, names)
