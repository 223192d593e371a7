"""Configs with the shapes that their checkpoints store, written down from the models' definitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiny import VISION, Kind, full_config, text_config

Shapes = dict[str, tuple[int, ...]]


def trunk_shapes(text: Mapping[str, Any], root: str, query: Mapping[int, int] | None = None) -> Shapes:
    """What a checkpoint of this config stores, written down from the model's definition; `query`: heads of a layer."""
    hidden, inner, experts = text["hidden_size"], text["intermediate_size"], text["num_experts"]
    out: Shapes = {f"{root}embed_tokens.weight": (text["vocab_size"], hidden), f"{root}norm.weight": (hidden,)}
    for layer, kind in enumerate(text["layer_types"]):
        full = kind == "full_attention"
        prefix = f"{root}layers.{layer}."
        width = text["global_head_dim"] if full else text["head_dim"]
        heads = (query or {}).get(layer, text["num_attention_heads"])
        group = text["num_attention_heads"] // text["num_global_key_value_heads" if full else "num_key_value_heads"]
        kv = max(heads // group, 1)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            out[f"{prefix}{norm}_layernorm.weight"] = (hidden,)
        out |= {
            f"{prefix}layer_scalar": (1,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}self_attn.q_proj.weight": (heads * width, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv * width, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, heads * width),
            f"{prefix}self_attn.q_norm.weight": (width,),
            f"{prefix}self_attn.k_norm.weight": (width,),
        }
        if not full:
            out[f"{prefix}self_attn.v_proj.weight"] = (kv * width, hidden)
        if experts:
            narrow = text["moe_intermediate_size"]
            for norm in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
                out[f"{prefix}{norm}.weight"] = (hidden,)
            out |= {
                f"{prefix}router.proj.weight": (experts, hidden),
                f"{prefix}router.scale": (hidden,),
                f"{prefix}router.per_expert_scale": (experts,),
                f"{prefix}experts.gate_up_proj": (experts, 2 * narrow, hidden),
                f"{prefix}experts.down_proj": (experts, hidden, narrow),
            }
    return out


def trunk(
    kind: Kind = "moe", query: Mapping[int, int] | None = None, **overrides: Any
) -> tuple[dict[str, Any], Shapes]:
    config = full_config(kind, **overrides)
    root = "model." if kind.endswith("-text") else "model.language_model."
    return config, trunk_shapes(config.get("text_config", config), root, query)


def drafter(**overrides: Any) -> tuple[dict[str, Any], Shapes]:
    own: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
                           "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}  # fmt: skip
    text = text_config("dense", **{**own, **overrides})
    shapes = {n: s for n, s in trunk_shapes(text, "model.").items() if not any(f".{k}" in n for k in ("k_", "v_"))}
    shapes |= {"pre_projection.weight": (32, 128), "post_projection.weight": (64, 32)}
    config = {"architectures": ["Gemma4AssistantForCausalLM"], "text_config": text, "backbone_hidden_size": 64}
    return config, shapes


def tower(clipped: bool = True, **overrides: Any) -> tuple[dict[str, Any], Shapes]:
    config, shapes = trunk("moe")
    config["vision_config"] = {**VISION, "use_clipped_linears": clipped, **overrides}
    width, inner = 32, 64
    shapes |= {
        "model.embed_vision.embedding_projection.weight": (64, width),
        "model.vision_tower.patch_embedder.input_proj.weight": (width, 48),
        "model.vision_tower.patch_embedder.position_embedding_table": (2, 64, width),
        "model.vision_tower.std_bias": (width,),
        "model.vision_tower.std_scale": (width,),
    }
    for layer in range(2):
        prefix = f"model.vision_tower.encoder.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{prefix}{norm}_layernorm.weight"] = (width,)
        shapes |= {f"{prefix}self_attn.{n}_norm.weight": (16,) for n in "qk"}
        linears = {**{f"self_attn.{n}_proj": (width, width) for n in "qkvo"}, "mlp.gate_proj": (inner, width),
                   "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}  # fmt: skip
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.linear.weight"] = shape
            if clipped:
                shapes |= {f"{prefix}{name}.{c}": () for c in ("input_min", "input_max", "output_min", "output_max")}
    return config, shapes
