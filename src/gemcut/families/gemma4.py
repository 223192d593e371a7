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
from gemcut.families.base import Attention, ExpertModule, Family, Norms, Serving
from gemcut.families.gguf import GgufLayout
from gemcut.families.heads import kept_kv_heads, mode_of
from gemcut.families.linears import Linears
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
    if names and all(name.startswith(("model.vision_tower.", "model.embed_vision.")) for name in names):
        raise CheckpointError(
            "this is a vision tower without its trunk",
            got=f"{len(names)} tensors, none of a decoder",
            hint="join them in one folder, as `python -m demo.train.join TRUNK TOWER OUT` does, and name that one",
        )
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
    """config.json after the cut: `num_experts`, or the head counts of a structural cut, and nothing else.

    Raises:
        UsageError: the plan says what the format cannot: different numbers of experts or query heads per layer, fewer
            experts than top_k_experts, KV heads that differ between layers with one key, a layer left out, query heads
            that would change their KV head, a layer that reads the keys of another.
    """
    new = copy.deepcopy(dict(config))
    text = new["text_config"] if isinstance(new.get("text_config"), dict) else new
    assert isinstance(text, dict)
    if plan.kind == "experts":
        text["num_experts"] = _experts_kept(text, plan)
    elif mode_of(plan) == "structural":
        _shrink_heads(text, plan)
    return new


def _experts_kept(text: Mapping[str, Json], plan: Plan) -> int:
    counts = {len(layer.keep) for layer in plan.layers.values()}
    if len(counts) != 1:
        raise UsageError(
            "every layer must keep the same number of experts",
            got=", ".join(str(c) for c in sorted(counts)),
            wanted="one count: config.json has one num_experts for all layers",
            hint="plan with one --keep",
        )
    kept = counts.pop()
    active = top_k(text)
    if kept < active:
        raise UsageError(
            "the plan keeps fewer experts than the router selects",
            got=f"{kept} kept",
            wanted=f"at least top_k_experts = {active}",
            hint=f"plan experts … --keep {active} or more",
        )
    return kept


def _shrink_heads(text: dict[str, Json], plan: Plan) -> None:
    """Patch num_attention_heads and the key that holds each layer's number of KV heads, in place."""
    layers = range(_number(text, "num_hidden_layers"))
    if sorted(plan.layers) != list(layers):
        raise UsageError(
            "a structural cut must name every layer: config.json has one num_attention_heads for all",
            where=f"layer {next((i for i in layers if i not in plan.layers), len(layers))}",
            got=f"{len(plan.layers)} layers",
            wanted=f"{len(layers)}",
            hint="mode mask can cut some layers and leave others, and so can gemcut gguf --plan",
        )
    counts = {len(one.keep) for one in plan.layers.values()}
    if len(counts) != 1:
        raise UsageError(
            "every layer must keep the same number of query heads",
            got=", ".join(str(c) for c in sorted(counts)),
            wanted="one count: config.json has one num_attention_heads for all layers",
            hint="gemcut gguf --plan writes a GGUF file of this plan: it has a count for every layer",
        )
    shared = [layer for layer in layers if _shares_kv(text, layer)]
    if shared or text.get("attention_bias"):
        raise UsageError(
            "this architecture cannot lose heads, only have them masked",
            where=f"layer {shared[0]}" if shared else "config.json: attention_bias",
            got="keys and values of an earlier layer" if shared else "biases of the projections",
            hint="plan with mode mask",
        )
    heads = _number(text, "num_attention_heads")
    after: dict[tuple[str | None, str], tuple[int, int]] = {}  # where the number lies → layer that said it first, KV
    for layer in layers:
        group = heads // _kv_heads(text, layer)
        kept = len(kept_kv_heads(group, plan.layers[layer].keep, where=f"layer {layer} of the plan"))
        first, wanted = after.setdefault(_kv_place(text, layer), (layer, kept))
        if kept != wanted:
            raise UsageError(
                "the layers keep different numbers of KV heads, and the config has one number for them",
                where=f"layers {first} and {layer} of the plan",
                got=f"{wanted} and {kept}",
            )
    for (own, key), (_, kept) in after.items():
        place = text if own is None else _own_config(text, own)
        assert place is not None
        place[key] = kept
    text["num_attention_heads"] = counts.pop()


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


def _own_config(text: Mapping[str, Json], layer: str) -> dict[str, Json] | None:
    per_layer = text.get("per_layer_config")
    entry = per_layer.get(layer) if isinstance(per_layer, dict) else None
    return entry if isinstance(entry, dict) else None


def _kv_place(text: Mapping[str, Json], layer: int) -> tuple[str | None, str]:
    """Where the layer's number of KV heads lies: its entry of per_layer_config (None: the flat keys), and the key."""
    own = _own_config(text, str(layer))
    if own is not None and "num_key_value_heads" in own:
        return str(layer), "num_key_value_heads"
    if _k_is_v(text, layer) and text.get("num_global_key_value_heads") is not None:
        return None, "num_global_key_value_heads"
    return None, "num_key_value_heads"


def _kv_heads(text: Mapping[str, Json], layer: int) -> int:
    """KV heads of one layer.

    Raises:
        CheckpointError: the query heads do not divide among them.
    """
    own, key = _kv_place(text, layer)
    kv_heads = _number((_own_config(text, own) if own is not None else None) or text, key)
    heads = _number(text, "num_attention_heads")
    if heads % kv_heads:
        raise CheckpointError(
            "the query heads do not divide among the key-value heads",
            where=f"config.json, layer {layer}",
            got=f"{heads} query heads, {kv_heads} KV heads",
        )
    return kv_heads


def _k_is_v(text: Mapping[str, Json], layer: int) -> bool:
    return layer_types(text)[layer] == "full_attention" and bool(text.get("attention_k_eq_v"))


def _shares_kv(text: Mapping[str, Json], layer: int) -> bool:
    """The last num_kv_shared_layers layers read the keys and values of the last layer of their type before them."""
    shared = text.get("num_kv_shared_layers")
    return isinstance(shared, int) and layer >= _number(text, "num_hidden_layers") - shared


def attention(text: Mapping[str, Json], names: Collection[str], layer: int) -> Attention:
    """Head counts and tensor names of one layer. Full-attention layers have their own number of KV heads where
    `attention_k_eq_v` is set, and then no v_proj.

    Raises:
        CheckpointError: the query heads do not divide among the KV heads.
    """
    prefix = layer_prefix(names, layer) + "self_attn."
    return Attention(
        heads=_number(text, "num_attention_heads"),
        kv_heads=_kv_heads(text, layer),
        head_dim=head_dim(text, layer),
        full=layer_types(text)[layer] == "full_attention",
        q=f"{prefix}q_proj.weight",
        k=f"{prefix}k_proj.weight",
        v=None if _k_is_v(text, layer) else f"{prefix}v_proj.weight",
        o=f"{prefix}o_proj.weight",
        shares_kv=_shares_kv(text, layer),
    )


def norms(prefix: str, moe: bool) -> Norms:
    """RMSNorm weights behind the branches of the layer that begins with `prefix`."""
    return Norms(
        attention=f"{prefix}post_attention_layernorm.weight",
        experts=f"{prefix}post_feedforward_layernorm_2.weight" if moe else None,
        dense=f"{prefix}post_feedforward_layernorm_1.weight" if moe else f"{prefix}post_feedforward_layernorm.weight",
    )


def gguf(config: Mapping[str, Json], shapes: Mapping[str, tuple[int, ...]]) -> GgufLayout:
    """See gemma4_gguf.trunk, which is built on this module's facts and is therefore imported late."""
    from gemcut.families.gemma4_gguf import trunk

    return trunk(config, shapes)


def gguf_vision(
    config: Mapping[str, Json], shapes: Mapping[str, tuple[int, ...]], preprocessor: Mapping[str, Json]
) -> GgufLayout:
    """See gemma4_vision_gguf.vision."""
    from gemcut.families.gemma4_vision_gguf import vision

    return vision(config, shapes, preprocessor)


def linears() -> Linears:
    """See gemma4_linears.LINEARS."""
    from gemcut.families.gemma4_linears import LINEARS

    return LINEARS


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
        text_model="Gemma4ForCausalLM",
        reasoning_parser="gemma4",
        tool_parser="gemma4",
        attention="eager",  # head_dim 512 has no flash kernel
        temperature=1.0,
        top_p=0.95,
        top_k=64,
    ),
    gguf=gguf,
    gguf_vision=gguf_vision,
    linears=linears,
    experts=ExpertModule(
        module="transformers.models.gemma4.modeling_gemma4",
        name="Gemma4TextExperts",
        experts="num_experts",
        hidden="hidden_size",
        inner="moe_intermediate_size",
        activation="hidden_activation",
    ),
)
