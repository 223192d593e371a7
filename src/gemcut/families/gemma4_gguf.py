"""What llama.cpp wants of a Gemma 4 trunk (architecture `gemma4`): keys, their order, and a place for every tensor.

Blocks       nothing is transposed or split; `experts.gate_up_proj` stays fused, gate rows first
K is V       full-attention layers have no attn_v: the loader takes K where V is missing
RoPE         full layers turn a quarter of the head and leave the rest: rope_freqs [D/2], 1 for turned, 1e30 for the
             others, which is how llama.cpp says "proportional"; sliding layers do not read it
Heads        attention.head_count and head_count_kv are numbers, or arrays with one entry per layer. The counts come
             from the shapes, so a cut that keeps other numbers of heads in every layer can be said here
Source       llama.cpp conversion/gemma.py and src/models/gemma4.cpp, the version that constraints.txt pins
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gemma4 import has_experts, head_dim, layer_types, text_config, top_k
from gemcut.families.gemma4_shapes import Shaper, Shapes, check_block, number, real
from gemcut.families.gguf import GgufLayout, GgufTensor, Value
from gemcut.types import F32, Json

# Tensors of every block: what follows `layers.N.` on disk → what follows `blk.N.` in the file
BLOCK: Mapping[str, str] = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}
KEYS: Mapping[str, str] = {
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
VALUES: Mapping[str, str] = {"self_attn.v_proj.weight": "attn_v.weight"}
EXPERTS: Mapping[str, str] = {
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
OUTSIDE: Mapping[str, str] = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
}
HEAD = "lm_head.weight"
UNTURNED = 1e30
_LAYER = re.compile(r"^layers\.(0|[1-9]\d*)\.(.+)$")
_OTHER_FILES = (
    ("model.vision_tower.", "vision tower: it goes into the mmproj file"),
    ("model.embed_vision.", "projector of the vision tower: it goes into the mmproj file"),
    ("model.audio_tower.", "audio tower: gemcut writes no file for it"),
    ("model.embed_audio.", "projector of the audio tower: gemcut writes no file for it"),
)


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts of every layer, counted in the shapes."""

    query: tuple[int, ...]
    kv: tuple[int, ...]


def refuse(config: Mapping[str, Json], text: Mapping[str, Json]) -> None:
    """What this map does not know, said before any tensor is looked at.

    Raises:
        UsageError: a quantised checkpoint, per-layer input embeddings, a double-wide MLP, biases, attention that sees
            ahead everywhere.
    """
    cases = (
        (config.get("quantization_config") or text.get("quantization_config"), "quantization_config",
         "this checkpoint is quantised already", "name the checkpoint that it was made from"),
        (text.get("hidden_size_per_layer_input"), "hidden_size_per_layer_input",
         "per-layer input embeddings (E2B, E4B) cannot be written as GGUF yet", "llama.cpp's own converter can"),
        (text.get("use_double_wide_mlp"), "use_double_wide_mlp",
         "a double-wide MLP (E2B, E4B) cannot be written as GGUF yet", "llama.cpp's own converter can"),
        (text.get("attention_bias"), "attention_bias",
         "biases of the attention cannot be written as GGUF", None),
        (text.get("use_bidirectional_attention") == "all", "use_bidirectional_attention",
         "attention that sees what comes after cannot be written as GGUF", None),
    )  # fmt: skip
    for said, key, what, hint in cases:
        if said:
            raise UsageError(what, where=f"config.json: {key}", hint=hint)


def rope(text: Mapping[str, Json]) -> tuple[float, float, float]:
    """Base of the full layers, base of the sliding layers, and the share of a full layer's head that turns.

    Raises:
        UsageError: another kind of RoPE than the architecture has.
    """
    said = text.get("rope_parameters")
    parts = said if isinstance(said, dict) else {}
    full, sliding = parts.get("full_attention"), parts.get("sliding_attention")
    full = full if isinstance(full, dict) else {}
    sliding = sliding if isinstance(sliding, dict) else {}
    kinds = (("full", full.get("rope_type", "proportional"), "proportional"),
             ("sliding", sliding.get("rope_type", "default"), "default"))  # fmt: skip
    for layers, kind, wanted in kinds:
        if kind != wanted:
            raise UsageError(
                "no such RoPE in this architecture's GGUF",
                where=f"config.json: rope_parameters, {layers} layers",
                got=repr(kind)[:40],
                wanted=wanted,
            )
    share = real(full, "partial_rotary_factor", 0.25)
    if not 0 < share <= 1:
        raise CheckpointError("partial_rotary_factor is no share", where="config.json", got=share, wanted="0 < x <= 1")
    return real(full, "rope_theta", 1e6), real(sliding, "rope_theta", 1e4), share


def rope_freqs(width: int, share: float) -> F32:
    """float32 [D/2]: what each frequency of a full layer is divided by. 1 turns it, 1e30 leaves it where it is."""
    turned = int(width * share / 2)
    return np.array([1.0] * turned + [UNTURNED] * (width // 2 - turned), dtype=np.float32)


def per_layer(counts: tuple[int, ...]) -> Value:
    """One number where all layers agree, else an array."""
    return Value("u32", counts[0]) if len(set(counts)) == 1 else Value("i32", counts)


def _widths(text: Mapping[str, Json]) -> tuple[int, int]:
    """Head width of the sliding layers (the config's own where there are none), and of the full layers."""
    types = layer_types(text)
    full = {head_dim(text, i) for i, kind in enumerate(types) if kind == "full_attention"}
    sliding = {head_dim(text, i) for i, kind in enumerate(types) if kind == "sliding_attention"}
    if len(full) != 1 or len(sliding) > 1:
        raise UsageError(
            "a GGUF has one head width for all full layers and one for all sliding layers",
            where="config.json",
            got=f"full {sorted(full)}, sliding {sorted(sliding)}",
        )
    return (sliding.pop() if sliding else number(text, "head_dim")), full.pop()


def text_metadata(arch: str, text: Mapping[str, Json], heads: Heads) -> dict[str, Value]:
    """Keys of a text decoder in the order of llama.cpp's converter, `general.file_type` (to be set) among them."""
    layers = len(layer_types(text))
    base, base_sliding, _ = rope(text)
    sliding, full = _widths(text)
    kinds = layer_types(text)
    out = {
        "block_count": Value("u32", layers),
        "context_length": Value("u32", number(text, "max_position_embeddings", 131072)),
        "embedding_length": Value("u32", number(text, "hidden_size")),
        "feed_forward_length": Value("u32", number(text, "intermediate_size")),
        "attention.head_count": per_layer(heads.query),
        "attention.head_count_kv": per_layer(heads.kv),
        "rope.freq_base": Value("f32", base),
        "rope.freq_base_swa": Value("f32", base_sliding),
        "attention.layer_norm_rms_epsilon": Value("f32", real(text, "rms_norm_eps", 1e-6)),
    }
    if has_experts(text):
        out["expert_count"] = Value("u32", number(text, "num_experts"))
        out["expert_used_count"] = Value("u32", top_k(text))
    out["attention.key_length"] = out["attention.value_length"] = Value("u32", full)
    out["general.file_type"] = Value("u32", 0)
    cap = real(text, "final_logit_softcapping", 0.0)
    if cap:
        out["final_logit_softcapping"] = Value("f32", cap)
    out["attention.sliding_window"] = Value("u32", number(text, "sliding_window"))
    out["attention.shared_kv_layers"] = Value("u32", number(text, "num_kv_shared_layers", 0))
    out["embedding_length_per_layer_input"] = Value("u32", 0)
    out["attention.sliding_window_pattern"] = Value("bool", tuple(kind == "sliding_attention" for kind in kinds))
    out["attention.key_length_swa"] = out["attention.value_length_swa"] = Value("u32", sliding)
    if has_experts(text):
        out["expert_feed_forward_length"] = Value("u32", number(text, "moe_intermediate_size"))
    out["rope.dimension_count"] = Value("u32", full)
    out["rope.dimension_count_swa"] = Value("u32", sliding)
    return {key if key.startswith("general.") else f"{arch}.{key}": value for key, value in out.items()}


def keeps_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Stored as float32 whatever the file's type: vectors, norms, the router, and what is no weight."""
    return len(shape) <= 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or not name.endswith(".weight")


def placed(name: str, shape: tuple[int, ...], source: str) -> GgufTensor:
    """A tensor of the trunk or drafter that is stored as it lies on disk."""
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    role = name.removeprefix(f"blk.{layer}.").removesuffix(".weight")
    return GgufTensor(name, shape, source, layer=layer, role=role, keep_f32=keeps_f32(name, shape))


def rope_tensor(text: Mapping[str, Json]) -> GgufTensor:
    """`rope_freqs.weight`, which no checkpoint stores."""
    values = rope_freqs(_widths(text)[1], rope(text)[2])
    return GgufTensor("rope_freqs.weight", values.shape, None, role="rope_freqs", values=values, keep_f32=True)


def place_all(
    shapes: Shapes, root: str, names: Callable[[int], Mapping[str, str]], layers: int, others: Mapping[str, str]
) -> tuple[list[GgufTensor], dict[str, str]]:
    """A place for every tensor, in the order of `shapes`, and the reason for every one that gets none.

    names(layer): what may follow `layers.N.`.   others: full names outside the blocks.
    Raises:
        CheckpointError: a tensor that the architecture does not have.
    """
    tensors: list[GgufTensor] = []
    left_out: dict[str, str] = {}
    for source, shape in shapes.items():
        target = others.get(source)
        if target is None and source.startswith(root):
            tail = source.removeprefix(root)
            target = OUTSIDE.get(tail)
            match = _LAYER.match(tail)
            if match and int(match[1]) < layers:
                inner = names(int(match[1])).get(match[2])
                target = None if inner is None else f"blk.{match[1]}.{inner}"
        if target is not None:
            tensors.append(placed(target, shape, source))
            continue
        reason = next((why for start, why in _OTHER_FILES if source.startswith(start)), None)
        if reason is None:
            raise CheckpointError(
                "a tensor that this architecture does not have",
                where=source[:200],
                got=f"shape {list(shape)}",
                hint="a GGUF without it would be another model; is config.json the right one?",
            )
        left_out[source] = reason
    return tensors, left_out


def _kv_of_every_layer(text: Mapping[str, Json], counted: list[int]) -> tuple[int, ...]:
    """A layer without keys of its own reads those of the last layer of its kind that has some."""
    last: dict[str, int] = {}
    out = []
    for layer, (kind, kv) in enumerate(zip(layer_types(text), counted, strict=True)):
        if not kv and kind not in last:
            raise CheckpointError("a layer shares keys, and no layer of its kind has any", where=f"layer {layer}")
        last[kind] = kv or last[kind]
        out.append(last[kind])
    return tuple(out)


def trunk(config: Mapping[str, Json], shapes: Shapes) -> GgufLayout:
    """The GGUF of a Gemma 4 decoder, dense or MoE, bare or inside the multimodal wrapper.

    Args:
        shapes: every tensor of the checkpoint; the file has them in this order. llama.cpp's converter takes shard by
            shard, and inside a shard by name. After an edit, the shapes of what will be written.
    Raises:
        UsageError: an architecture's part that cannot be written.
        CheckpointError: shapes and config disagree, a tensor is missing, or one is unknown.
    """
    text = text_config(config)
    refuse(config, text)
    root = "model.language_model." if "model.language_model.norm.weight" in shapes else "model."
    layers = len(layer_types(text))
    hidden = number(text, "hidden_size")
    shaper = Shaper(shapes)
    shaper.one(f"{root}embed_tokens.weight", (number(text, "vocab_size"), hidden))
    shaper.one(f"{root}norm.weight", (hidden,))
    counts = [check_block(shaper, text, f"{root}layers.{i}.", i, queries_only=False) for i in range(layers)]
    heads = Heads(tuple(q for q, _ in counts), _kv_of_every_layer(text, [kv for _, kv in counts]))
    block = {**BLOCK, **KEYS, **VALUES, **(EXPERTS if has_experts(text) else {})}
    said = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    if HEAD in shapes:
        shaper.one(HEAD, (number(text, "vocab_size"), hidden))
    elif not said:
        raise CheckpointError("the output head is not tied, and is not there", where=HEAD)
    tensors, left_out = place_all(shapes, root, lambda _: block, layers, {HEAD: "output.weight"})
    return GgufLayout(
        architecture="gemma4",
        metadata=text_metadata("gemma4", text, heads),
        tensors=(rope_tensor(text), *tensors),
        layers=layers,
        experts=number(text, "num_experts") if has_experts(text) else 0,
        group=heads.query[0] // heads.kv[0],
        tied=HEAD not in shapes,
        left_out=left_out,
    )
