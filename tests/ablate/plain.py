"""A small corpus, changed checkpoints, and the stock model whole in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gemcut.checkpoint.read import open_checkpoint
from gemcut.stream.corpus import Corpus, Row
from gemcut.stream.rendering import tokenizer_hash

LAYERS = 4
HEADS = 4
SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "initializer_range": 0.2,
}
SIZES = (30, 9, 12, 21, 12, 2, 17, 30)


def make_corpus(folder: Path, sizes: tuple[int, ...]) -> Corpus:
    rng = np.random.default_rng(3)
    rows = []
    for i, size in enumerate(sizes):
        ids = np.concatenate([[2], rng.integers(10, 300, size - 1)]).astype(np.int64)
        rows.append(Row(f"q{i}", ("code", "math", "story")[i % 3], ids, 1.0))
    classes = tuple(sorted({row.cls for row in rows}))
    return Corpus(tuple(rows), "a" * 64, "b" * 64, tokenizer_hash(folder), "text: added", 4096, 0, classes)


def changed(base: Path, out: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint, every tensor through `edit`."""
    shutil.copytree(base, out)
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            tensors = {name: edit(name, f.get_tensor(name).clone()).contiguous() for name in f.keys()}  # noqa: SIM118
        save_file(tensors, shard, metadata={"format": "pt"})
    return out


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def head_widths(folder: Path) -> list[int]:
    return [one.slices[1].block for one in open_checkpoint(folder).sites if one.kind == "heads"]


def item_losses(model: Any, corpus: Corpus) -> list[torch.Tensor]:
    """Float64 losses [T − 1] of each item, run alone, without padding."""
    out = []
    for row in corpus.items:
        ids = torch.from_numpy(row.ids.copy())
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        out.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return out


def layers_of(model: Any) -> Any:
    return model.get_decoder().layers
