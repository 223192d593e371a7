"""The two demo architectures: the text configurations, tensor names, shapes and initial values.

Legend: H hidden, E experts, I expert width, F dense width, Q query heads, K key-value heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

PREFIX = "model.language_model."


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs between the demo models; the rest is the same as in Gemma 4."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    global_kv_heads: int
    head_dim: int
    global_head_dim: int
    dense_width: int
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    hidden: int = 256
    vocab: int = 4096
    window: int = 128
    softcap: float = 30.0
    shards: int = 3

    def is_full(self, layer: int) -> bool:
        """Every sixth layer attends to everything."""
        return layer % 6 == 5

    def dims(self, layer: int) -> tuple[int, int]:
        """Key-value heads and head dimension of a layer."""
        return (self.global_kv_heads, self.global_head_dim) if self.is_full(layer) else (self.kv_heads, self.head_dim)


MOE = Shape("moe", 6, 4, 2, 1, 64, 128, 160, experts=32, top_k=4, expert_width=64, shards=3)
DENSE = Shape("dense", 12, 8, 4, 2, 32, 64, 512, shards=2)
SHAPES = {shape.name: shape for shape in (MOE, DENSE)}


def text_config(shape: Shape) -> dict[str, object]:
    """The flat `text_config` of Gemma 4's config.json."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": shape.experts > 0,
        "eos_token_id": 1,
        "final_logit_softcapping": shape.softcap,
        "global_head_dim": shape.global_head_dim,
        "head_dim": shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": shape.hidden,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": shape.dense_width,
        "layer_types": ["full_attention" if shape.is_full(i) else "sliding_attention" for i in range(shape.layers)],
        "max_position_embeddings": 2048,
        "model_type": "gemma4_text",
        "moe_intermediate_size": shape.expert_width or None,
        "num_attention_heads": shape.query_heads,
        "num_experts": shape.experts or None,
        "num_global_key_value_heads": shape.global_kv_heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": shape.window,
        "tie_word_embeddings": True,
        "top_k_experts": shape.top_k or None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": shape.vocab,
        "vocab_size_per_layer_input": shape.vocab,
    }


def tensors(shape: Shape) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name (below `PREFIX`) to (shape, kind); kinds are `matrix`, `embedding`, `router`, `norm:<init>`, `scalar`."""
    hidden = shape.hidden
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    found["embed_tokens.weight"] = ((shape.vocab, hidden), "embedding")
    branch = f"norm:{1 / math.sqrt(2 * shape.layers)}"
    for layer in range(shape.layers):
        base = f"layers.{layer}."
        kv, dim = shape.dims(layer)
        found[f"{base}self_attn.q_proj.weight"] = ((shape.query_heads * dim, hidden), "matrix")
        found[f"{base}self_attn.k_proj.weight"] = ((kv * dim, hidden), "matrix")
        if not shape.is_full(layer):
            found[f"{base}self_attn.v_proj.weight"] = ((kv * dim, hidden), "matrix")
        found[f"{base}self_attn.o_proj.weight"] = ((hidden, shape.query_heads * dim), "matrix")
        # Attention is not scaled by 1/sqrt(D) in Gemma 4; the two norms start with the product of that size.
        found[f"{base}self_attn.q_norm.weight"] = ((dim,), f"norm:{dim**-0.25}")
        found[f"{base}self_attn.k_norm.weight"] = ((dim,), f"norm:{dim**-0.25}")
        found[f"{base}mlp.gate_proj.weight"] = ((shape.dense_width, hidden), "matrix")
        found[f"{base}mlp.up_proj.weight"] = ((shape.dense_width, hidden), "matrix")
        found[f"{base}mlp.down_proj.weight"] = ((hidden, shape.dense_width), "matrix")
        for name in ("input_layernorm", "pre_feedforward_layernorm"):
            found[f"{base}{name}.weight"] = ((hidden,), "norm:1.0")
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            found[f"{base}{name}.weight"] = ((hidden,), branch)
        found[f"{base}layer_scalar"] = ((1,), "scalar")
        if shape.experts:
            found[f"{base}experts.gate_up_proj"] = ((shape.experts, 2 * shape.expert_width, hidden), "matrix")
            found[f"{base}experts.down_proj"] = ((shape.experts, hidden, shape.expert_width), "matrix")
            found[f"{base}router.proj.weight"] = ((shape.experts, hidden), "router")
            found[f"{base}router.scale"] = ((hidden,), "norm:1.0")
            found[f"{base}router.per_expert_scale"] = ((shape.experts,), "norm:1.0")
            for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
                found[f"{base}{name}.weight"] = ((hidden,), "norm:1.0")
    found["norm.weight"] = ((hidden,), "norm:1.0")
    return found


def initial(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Float32 start values: matrices N(0, 1/fan_in), embedding N(0, 0.04²), router N(0, 0.5²/...), norms constant."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, (size, kind) in tensors(shape).items():
        if kind.startswith("norm:"):
            values[name] = torch.full(size, float(kind.split(":")[1]))
        elif kind == "scalar":
            values[name] = torch.ones(size)
        else:
            # The router sees a unit vector times 1 after its norm and H^-0.5, so std 1 gives logits of std 1.
            std = {"embedding": 0.04, "router": 0.5}.get(kind, size[-1] ** -0.5)
            values[name] = torch.randn(size, generator=generator) * std
    return values
