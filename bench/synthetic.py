"""Write a synthetic checkpoint with the layer geometry of Gemma 4 26B-A4B or 31B: real shapes and names, random bf16.

    python bench/synthetic.py --layers 5 --out folder --seed 0

A layer is 1.67 GB. The text model only (no vision tower); the vocabulary is small unless asked for, because a cut
does not touch it. Values are one random block, tiled with an offset per tensor: no two experts are alike.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemcut.checkpoint.header import lay_out
from gemcut.types import TensorRef

_BLOCK = 4_194_301  # elements; prime, so that no expert's size is a multiple of it


@dataclass(frozen=True, slots=True)
class Geometry:
    """Widths of one layer; the defaults are those of 26B-A4B. Without experts the decoder is dense."""

    hidden: int = 2816
    experts: int = 128
    expert_width: int = 704
    top_k: int = 8
    dense: int = 2112
    heads: int = 16
    kv_heads: int = 8
    global_kv_heads: int = 2
    head_dim: int = 256
    global_head_dim: int = 512
    vocabulary: int = 4096


DENSE_31B = Geometry(
    hidden=5376, experts=0, expert_width=0, top_k=0, dense=21504, heads=32, kv_heads=16, global_kv_heads=4,
)  # fmt: skip
DENSE_31B_LAYERS = 60


def layer_types(layers: int) -> list[str]:
    """Five sliding layers to one full; the last is full."""
    types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    types[-1] = "full_attention"
    return types


def shapes(geometry: Geometry, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor of the text model with its shape, in the order of the layers."""
    g = geometry
    out: list[tuple[str, tuple[int, ...]]] = [
        ("model.language_model.embed_tokens.weight", (g.vocabulary, g.hidden)),
    ]
    for i, kind in enumerate(layer_types(layers)):
        p = f"model.language_model.layers.{i}."
        full = kind == "full_attention"
        d = g.global_head_dim if full else g.head_dim
        kv = (g.global_kv_heads if full else g.kv_heads) * d
        out += [
            (p + "self_attn.q_proj.weight", (g.heads * d, g.hidden)),
            (p + "self_attn.k_proj.weight", (kv, g.hidden)),
            *([] if full else [(p + "self_attn.v_proj.weight", (kv, g.hidden))]),
            (p + "self_attn.o_proj.weight", (g.hidden, g.heads * d)),
            (p + "self_attn.q_norm.weight", (d,)),
            (p + "self_attn.k_norm.weight", (d,)),
            (p + "mlp.gate_proj.weight", (g.dense, g.hidden)),
            (p + "mlp.up_proj.weight", (g.dense, g.hidden)),
            (p + "mlp.down_proj.weight", (g.hidden, g.dense)),
        ]
        norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                 "post_feedforward_layernorm"]  # fmt: skip
        if g.experts:
            out += [
                (p + "experts.gate_up_proj", (g.experts, 2 * g.expert_width, g.hidden)),
                (p + "experts.down_proj", (g.experts, g.hidden, g.expert_width)),
                (p + "router.proj.weight", (g.experts, g.hidden)),
                (p + "router.scale", (g.hidden,)),
                (p + "router.per_expert_scale", (g.experts,)),
            ]
            norms += ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"]
        out.append((p + "layer_scalar", (1,)))
        out += [(f"{p}{norm}.weight", (g.hidden,)) for norm in norms]
    out.append(("model.language_model.norm.weight", (g.hidden,)))
    return out


def config(geometry: Geometry, layers: int) -> dict[str, object]:
    """config.json of the wrapper, flat keys."""
    g = geometry
    text = {
        "model_type": "gemma4_text", "dtype": "bfloat16", "vocab_size": g.vocabulary, "hidden_size": g.hidden,
        "intermediate_size": g.dense, "num_hidden_layers": layers, "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads, "num_global_key_value_heads": g.global_kv_heads, "head_dim": g.head_dim,
        "global_head_dim": g.global_head_dim, "attention_k_eq_v": True, "layer_types": layer_types(layers),
        "sliding_window": 1024, "enable_moe_block": g.experts > 0, "num_experts": g.experts or None,
        "top_k_experts": g.top_k or None, "moe_intermediate_size": g.expert_width or None,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": g.vocabulary, "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "max_position_embeddings": 262144,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
        "rms_norm_eps": 1e-06, "initializer_range": 0.02, "use_bidirectional_attention": None,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
    }  # fmt: skip
    return {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "dtype": "bfloat16",
        "text_config": text, "vision_config": None, "audio_config": None, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": [1, 106], "bos_token_id": 2,
    }  # fmt: skip


def write(
    out: Path,
    *,
    layers: int,
    seed: int = 0,
    geometry: Geometry | None = None,
    shard_bytes: int = 3 << 30,
    sparse: bool = False,
) -> Path:
    """Write the folder: shards, index, config. Returns it. sparse: real headers before holes that take no disk."""
    g = geometry or Geometry()
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(_BLOCK, dtype=np.float32) * np.float32(0.02)
    weights = np.tile(_bf16(block), 2)
    ones = np.tile(_bf16(1 + block), 2)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(g, layers):
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = lay_out(file, [TensorRef(n, "BF16", s, file, 0, 0) for n, s in tensors], {"format": "pt"})
        with open(out / file, "wb") as f:
            f.write(len(header.raw).to_bytes(8, "little") + header.raw)
            if sparse:
                f.truncate(header.tensors[-1].stop)
            for ref in header.tensors:
                values = ones if len(ref.shape) == 1 else weights
                if not sparse:
                    _write_tiled(f, values, int(rng.integers(_BLOCK)), ref.elements)
                weight_map[ref.name] = file
                total += ref.size_bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config(g, layers), indent=2) + "\n")
    return out


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")


def _write_tiled(f: BinaryIO, values: np.ndarray, offset: int, elements: int) -> None:
    while elements:
        n = min(elements, _BLOCK)
        f.write(values[offset : offset + n].data)
        offset = (offset + n) % _BLOCK
        elements -= n


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()
    write(args.out, layers=args.layers, seed=args.seed, geometry=Geometry(vocabulary=args.vocabulary))
    print(args.out)


if __name__ == "__main__":
    main()
