"""A layout and an importance matrix small enough to check by hand."""

from __future__ import annotations

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.export.imatrix import Entry, Imatrix
from gemcut.families.gemma4_gguf import trunk
from gemcut.families.gguf import GgufLayout, GgufTensor

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"


def layout_of(checkpoint: Checkpoint) -> GgufLayout:
    return trunk(checkpoint.config, {name: ref.shape for name, ref in checkpoint.tensors.items()})


def small_layout(units: int = 4, columns: int = 8) -> GgufLayout:
    tensors = (
        GgufTensor("token_embd.weight", (16, columns), "embed", role="token_embd"),
        GgufTensor("blk.0.attn_norm.weight", (columns,), "layers.0.norm.weight", layer=0, keep_f32=True),
        GgufTensor(DENSE, (6, columns), "layers.0.self_attn.q_proj.weight", layer=0, role="attn_q"),
        GgufTensor(EXPERTS, (units, 6, columns), "layers.0.experts.down_proj", layer=0, role="ffn_down_exps"),
    )
    return GgufLayout("gemma4", {}, tensors, 1, units, 2, True)


def small(seed: int = 0, units: int = 4, columns: int = 8, counts: tuple[int, ...] | None = None) -> Imatrix:
    rng = np.random.default_rng(seed)
    seen = np.array(counts or rng.integers(1, 500, units), np.int64)
    entries = {
        DENSE: Entry(rng.random((1, columns), np.float32) * 100, np.array([1000], np.int64)),
        EXPERTS: Entry((rng.random((units, columns)) * seen[:, None]).astype(np.float32), seen),
    }
    return Imatrix(entries, ("text.txt",), 2, 512)
