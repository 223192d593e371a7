"""The goldens: layouts, and the types llama-quantize said for them (bench/bench_gguf_types.py writes them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemcut.families.gguf import GgufLayout, GgufTensor

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens.json").read_text())
REFUSED = "refused"
BY_HAND = (r"blk\.[0-3]\.attn_V=q8_0", "ffn_down=IQ4_XS")


def unfold(roles: dict[str, Any], count: int) -> dict[str, str]:
    """Role → value, or role → {value: layers}, as name → value."""
    out = {}
    for role, said in roles.items():
        if role in ("token_embd.weight", "output.weight", "per_layer_token_embd.weight"):
            out[role] = said
            continue
        for value, layers in said.items() if isinstance(said, dict) else [(said, f"0-{count - 1}")]:
            for part in layers.split(","):
                start, _, stop = part.partition("-")
                out |= {f"blk.{i}.{role}": value for i in range(int(start), int(stop or start) + 1)}
    return out


def layout(case: str) -> GgufLayout:
    """The matrices of a case, and a norm, a router and a scale that are no matter of choice."""
    facts = GOLDENS[case]
    shapes = unfold(facts["shapes"], facts["layers"])
    tensors = [GgufTensor(name, tuple(map(int, shape.split("x"))), source=None) for name, shape in shapes.items()]
    hidden = tensors[0].shape[-1]
    extra = [
        GgufTensor("output_norm.weight", (hidden,), source=None),
        GgufTensor("blk.0.attn_norm.weight", (hidden,), source=None, keep_f32=True),
        GgufTensor("blk.0.ffn_gate_inp.weight", (8, hidden), source=None, keep_f32=True),
        GgufTensor("blk.0.ffn_down_exps.scale", (8,), source=None),
    ]
    return GgufLayout(
        architecture="gemma4",
        metadata={},
        tensors=(*reversed(tensors), *extra),  # the order in the file is no matter
        layers=facts["layers"],
        experts=facts["experts"],
        group=facts["group"],
        tied="output.weight" not in shapes,
    )
