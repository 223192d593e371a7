"""The facts of the family, held against what transformers builds from them."""

from __future__ import annotations

from dataclasses import replace
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


# ---------------------------------------------------------------- heads

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
WHOLE, THIN = (0, 1, 4, 5, 6, 7), (0, 1, 3, 4, 6, 7)  # 3 of 4 KV heads with their 2; 3 query heads on each of 2


def head_plan(keep: dict[int, tuple[int, ...]], mode: str = "structural", units: int = 8) -> Plan:
    return replace(plan(keep, units), kind="heads", params={"mode": mode})


def structural(**changes: tuple[int, ...]) -> Plan:
    keep = {**dict.fromkeys(range(5), WHOLE), 5: THIN}
    return head_plan({**keep, **{int(layer[1:]): kept for layer, kept in changes.items()}})


@pytest.mark.parametrize("kind", ["dense", "moe", "dense-text"])
def test_shrink_changes_the_head_counts_and_nothing_else(kind: str) -> None:
    config = full_config(kind, **EIGHT)
    new = FAMILY.shrink(config, structural())
    text = new if kind == "dense-text" else new["text_config"]
    counts = [text[key] for key in ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")]
    assert counts == [6, 3, 2]
    text.update(EIGHT)
    assert new == config
    assert list(new) == list(config)


def test_masking_heads_changes_no_config() -> None:
    config = full_config("dense", **EIGHT)
    assert FAMILY.shrink(config, head_plan({2: (0, 1, 2)}, "mask")) == config
    assert FAMILY.shrink(config, replace(head_plan({2: (0, 1, 2)}), params={})) == config


def test_one_key_for_all_layers_without_k_eq_v() -> None:
    config = full_config("dense", **EIGHT, attention_k_eq_v=False)
    new = FAMILY.shrink(config, structural(_5=WHOLE))["text_config"]
    assert [new["num_key_value_heads"], new["num_global_key_value_heads"]] == [3, 2]  # the second is not read
    with pytest.raises(UsageError, match="different numbers of KV heads") as caught:
        FAMILY.shrink(config, head_plan({**dict.fromkeys(range(5), (0, 2, 4, 6)), 5: (0, 1, 2, 3)}))
    assert "layers 0 and 5" in str(caught.value)


def test_head_counts_in_the_other_config_form() -> None:
    config = full_config("dense", **EIGHT)
    text = config["text_config"]
    del text["num_global_key_value_heads"], text["global_head_dim"]
    text["per_layer_config"] = {"5": {"head_dim": 32, "num_key_value_heads": 4}}
    new = FAMILY.shrink(config, structural(_5=WHOLE))["text_config"]
    assert (new["num_attention_heads"], new["num_key_value_heads"]) == (6, 3)
    assert new["per_layer_config"] == {"5": {"head_dim": 32, "num_key_value_heads": 3}}
    assert text["per_layer_config"]["5"]["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (structural(_3=(0, 1, 2, 4, 6, 7)), "another KV head"),
        (structural(_5=(0, 1, 2, 3, 4, 5)), "another KV head"),
        (structural(_3=(0, 1, 2, 3)), "same number of query heads"),
        (head_plan({0: WHOLE}), "must name every layer"),
        (head_plan(dict.fromkeys(range(6), ())), "keeps no query head"),
        (head_plan(dict.fromkeys(range(6), WHOLE), "free"), "no such way"),
    ],
)
def test_head_cuts_that_the_format_cannot_say(bad: Plan, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        FAMILY.shrink(full_config("dense", **EIGHT), bad)


@pytest.mark.parametrize(("key", "value"), [("num_kv_shared_layers", 2), ("attention_bias", True)])
def test_architectures_that_can_only_mask_heads(key: str, value: object) -> None:
    config = full_config("dense", **EIGHT, **{key: value})
    with pytest.raises(UsageError, match="only have them masked"):
        FAMILY.shrink(config, structural())
    assert FAMILY.shrink(config, replace(structural(), params={"mode": "mask"})) == config


def test_layers_that_share_keys_and_values() -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(6)]
    text = dict(text_config(full_config("dense", num_kv_shared_layers=2)))
    assert [FAMILY.attention(text, names, i).shares_kv for i in range(6)] == [False] * 4 + [True] * 2
    del text["num_kv_shared_layers"]
    assert not any(FAMILY.attention(text, names, i).shares_kv for i in range(6))


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
