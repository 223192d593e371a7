"""Gemma 4: dense (31B) and mixture of experts (26B-A4B) text decoders, bare or inside the multimodal wrapper.

Disk names   model.language_model.layers.N.… (wrapper), model.layers.N.… (text-only); nothing is fused at load
Attention    layer_types[N] is sliding (head_dim, num_key_value_heads) or full (global_head_dim,
             num_global_key_value_heads; with attention_k_eq_v no v_proj: V is the raw k_proj output)
             self_attn.q_proj [heads·D, H]   self_attn.o_proj [H, heads·D]
MoE          router and fused experts run in parallel with the dense MLP, each branch behind its own RMSNorm;
             softmax over all experts, top-k, renormalised to 1, times per_expert_scale
             experts.gate_up_proj [E, 2I, H]   experts.down_proj [E, H, I]   (no .weight suffix)
             router.proj.weight [E, H]   router.per_expert_scale [E]   router.scale [H] (not touched by a cut)
Config       on disk the global_* keys are flat; transformers ≥ 5.15 writes per_layer_config instead, so config.json
             is patched as JSON and never saved through transformers
Source       transformers models/gemma4/modeling_gemma4.py, release 5.22.0
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.base import Attention, Family, Norms, Serving
from gemcut.types import Json, Plan, Site, Slice

_LAYER = re.compile(r"^(?P<root>model\.(?:language_model\.)?)layers\.(?P<layer>\d+)\.")


def text_config(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """The decoder's numbers: `text_config` of the wrapper, or the whole config of a text-only checkpoint."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _number(text: Mapping[str, Json], key: str) -> int:
    value = text.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(
            f"config.json has no usable {key}", where="config.json", got=repr(value)[:60], wanted="a positive integer"
        )
    return value


def layer_types(text: Mapping[str, Json]) -> tuple[str, ...]:
    """Attention kind of every layer: "sliding_attention" or "full_attention"."""
    layers = _number(text, "num_hidden_layers")
    types = text.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(
            "config.json: layer_types does not list every layer",
            where="config.json",
            got=f"{len(types) if isinstance(types, list) else type(types).__name__}",
            wanted=f"{layers} entries",
        )
    bad = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if bad:
        raise CheckpointError("config.json: unknown attention type", where="layer_types", got=str(bad[0])[:60])
    return tuple(str(t) for t in types)


def head_dim(text: Mapping[str, Json], layer: int) -> int:
    """Head width of one layer, from the flat keys or from a per_layer_config that transformers ≥ 5.15 wrote."""
    per_layer = text.get("per_layer_config")
    if isinstance(per_layer, dict):
        entry = per_layer.get(str(layer))
        if isinstance(entry, dict) and isinstance(entry.get("head_dim"), int):
            return _number(entry, "head_dim")
    if layer_types(text)[layer] == "full_attention" and text.get("global_head_dim"):
        return _number(text, "global_head_dim")
    return _number(text, "head_dim")


def has_experts(text: Mapping[str, Json]) -> bool:
    """Whether the decoder has routed experts."""
    return bool(text.get("enable_moe_block"))


def top_k(text: Mapping[str, Json]) -> int:
    """Experts per token; 0 for a dense decoder."""
    return _number(text, "top_k_experts") if has_experts(text) else 0


def layer_prefix(names: Collection[str], layer: int) -> str:
    """`model.language_model.layers.N.` or `model.layers.N.`, whichever this checkpoint uses."""
    for root in ("model.language_model.", "model."):
        prefix = f"{root}layers.{layer}."
        if f"{prefix}input_layernorm.weight" in names:
            return prefix
    raise CheckpointError(
        "the checkpoint has no decoder layer of this number",
        where=f"layer {layer}",
        wanted=f"model.language_model.layers.{layer}.input_layernorm.weight",
        hint="is a shard missing, or is this an adapter and not a full checkpoint?",
    )


def sites(text: Mapping[str, Json], names: Collection[str]) -> tuple[Site, ...]:
    """Every place that can be cut, layer by layer: `experts` (MoE only) and query `heads`."""
    out: list[Site] = []
    heads = _number(text, "num_attention_heads")
    for layer in range(_number(text, "num_hidden_layers")):
        prefix = layer_prefix(names, layer)
        if has_experts(text):
            out.append(
                Site(
                    layer,
                    "experts",
                    _number(text, "num_experts"),
                    (
                        Slice(f"{prefix}experts.gate_up_proj", 0, 1),
                        Slice(f"{prefix}experts.down_proj", 0, 1),
                        Slice(f"{prefix}router.proj.weight", 0, 1),
                        Slice(f"{prefix}router.per_expert_scale", 0, 1),
                    ),
                )
            )
        width = head_dim(text, layer)
        out.append(
            Site(
                layer,
                "heads",
                heads,
                (
                    Slice(f"{prefix}self_attn.q_proj.weight", 0, width),
                    Slice(f"{prefix}self_attn.o_proj.weight", 1, width),
                ),
            )
        )
    return tuple(out)


def shrink(config: Mapping[str, Json], plan: Plan) -> dict[str, Json]:
    """config.json after the cut: only `num_experts` changes, and not at all for an identity plan.

    Raises:
        UsageError: the plan keeps a different number of experts per layer (the format has one number for all
            layers), or fewer than top_k_experts, or is not about experts.
    """
    new = copy.deepcopy(dict(config))
    if plan.kind != "experts":
        raise UsageError("this plan changes no key of config.json", got=plan.kind, wanted="experts")
    counts = {len(layer.keep) for layer in plan.layers.values()}
    if len(counts) != 1:
        raise UsageError(
            "every layer must keep the same number of experts",
            got=", ".join(str(c) for c in sorted(counts)),
            wanted="one count: config.json has one num_experts for all layers",
            hint="plan with one --keep",
        )
    kept = counts.pop()
    text = new["text_config"] if isinstance(new.get("text_config"), dict) else new
    assert isinstance(text, dict)
    active = top_k(text)
    if kept < active:
        raise UsageError(
            "the plan keeps fewer experts than the router selects",
            got=f"{kept} kept",
            wanted=f"at least top_k_experts = {active}",
            hint=f"plan experts … --keep {active} or more",
        )
    text["num_experts"] = kept
    return new


def module_of(site: Site) -> str:
    """Module below the decoder layer that runs the site."""
    return "experts" if site.kind == "experts" else "self_attn"


def component(name: str) -> str:
    """Which component of the model a tensor belongs to (see `families.base.COMPONENTS`)."""
    rules = (
        (r"vision|embed_audio|audio", "vision"),
        (r"embed_tokens|lm_head", "embedding"),
        (r"\.router\.", "router"),
        (r"\.experts\.", "experts"),
        (r"\.mlp\.", "dense mlp"),
        (r"norm", "norms"),
        (r"\.self_attn\.", "attention"),
        (r"layer_scalar$", "norms"),
    )
    for pattern, part in rules:
        if re.search(pattern, name):
            return part
    return "other"


def attention(text: Mapping[str, Json], names: Collection[str], layer: int) -> Attention:
    """Head counts and tensor names of one layer. Full-attention layers have their own number of KV heads where
    `attention_k_eq_v` is set, and then no v_proj.

    Raises:
        CheckpointError: the query heads do not divide among the KV heads.
    """
    prefix = layer_prefix(names, layer) + "self_attn."
    full = layer_types(text)[layer] == "full_attention"
    k_eq_v = full and bool(text.get("attention_k_eq_v"))
    heads = _number(text, "num_attention_heads")
    own = k_eq_v and text.get("num_global_key_value_heads") is not None
    per_layer = text.get("per_layer_config")
    entry = per_layer.get(str(layer)) if isinstance(per_layer, dict) else None
    if isinstance(entry, dict) and "num_key_value_heads" in entry:
        kv_heads = _number(entry, "num_key_value_heads")
    else:
        kv_heads = _number(text, "num_global_key_value_heads" if own else "num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            "the query heads do not divide among the key-value heads",
            where=f"config.json, layer {layer}",
            got=f"{heads} query heads, {kv_heads} KV heads",
        )
    v = f"{prefix}v_proj.weight"
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim(text, layer),
        full=full,
        q=f"{prefix}q_proj.weight",
        k=f"{prefix}k_proj.weight",
        v=None if k_eq_v else v,
        o=f"{prefix}o_proj.weight",
    )


def norms(prefix: str, moe: bool) -> Norms:
    """RMSNorm weights behind the branches of the layer that begins with `prefix`."""
    return Norms(
        attention=f"{prefix}post_attention_layernorm.weight",
        experts=f"{prefix}post_feedforward_layernorm_2.weight" if moe else None,
        dense=f"{prefix}post_feedforward_layernorm_1.weight" if moe else f"{prefix}post_feedforward_layernorm.weight",
    )


FAMILY = Family(
    name="gemma4",
    architectures=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    sites=sites,
    shrink=shrink,
    module_of=module_of,
    layer_prefix=layer_prefix,
    component=component,
    attention=attention,
    norms=norms,
    text_config=text_config,
    top_k=top_k,
    renormalises=True,
    serving=Serving(
        bos=True,
        reasoning_parser="gemma4",
        tool_parser="gemma4",
        attention="eager",  # head_dim 512 has no flash kernel
        temperature=1.0,
        top_p=0.95,
        top_k=64,
    ),
)
