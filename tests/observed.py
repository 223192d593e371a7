"""Statistics of a tiny checkpoint as an observation could have made them, with sums known by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gemcut.checkpoint import Checkpoint
from gemcut.families.linears import LinearGroup
from gemcut.records import LayerFile, save_statistics_index
from gemcut.records.statistics import STATISTICS_SCHEMA
from gemcut.store import sha256_file
from gemcut.types import Question, StatisticsMeta


def groups_of(model: Checkpoint) -> tuple[LinearGroup, ...]:
    shapes = {name: ref.shape for name, ref in model.tensors.items()}
    return model.family.linears().groups(model.text_config, shapes)


def statistics(folder: Path, model: Checkpoint, tokens: np.ndarray, *, fingerprint: str = "") -> Path:
    """Sums that an observation could have made: `tokens` [E] of every expert; column f has E[a²] = (f + 1)².

    The largest key and value of layer i are 0.5 + i/4.
    """
    folder.mkdir()
    files = []
    for layer in range(6):
        tensors, aliases = {}, {}
        for group in groups_of(model):
            if group.layer != layer or f"linear.{group.input}.n" in tensors:
                continue
            grouped = group.part == "experts"
            n = np.stack([tokens, tokens]).astype(np.float64) if grouped else np.array([50.0, 50.0])
            width = group.matrices[0].columns
            column = np.arange(1, width + 1, dtype=np.float64)
            a2 = n[..., None] * column**2
            amax = (np.sqrt(n.sum(0) > 0)[..., None] * column * 4).astype(np.float32)
            if grouped:
                amax *= np.arange(1, len(tokens) + 1, dtype=np.float32)[:, None]
            values = {"n": n, "a2": a2, "a4": a2 * column**2 * 3, "amax": amax}
            tensors |= {f"linear.{group.input}.{key}": value for key, value in values.items()}
            for other in group.matrices[1:]:
                if not grouped:
                    inside = other.module.rpartition(f"layers.{layer}.")[2]
                    aliases[inside] = group.input
        tensors |= {f"cache.{name}.amax": np.array([0.25, 0.5 + layer / 4], np.float32) for name in "kv"}
        path = folder / f"layer-{layer:03d}.safetensors"
        save_file(tensors, path, metadata={"aliases": json.dumps(aliases)})
        files.append(LayerFile(layer, path.name, sha256_file(path)))
    meta = StatisticsMeta(
        schema=STATISTICS_SCHEMA, model_fingerprint=fingerprint or model.fingerprint, model_name=model.name,
        family="gemma4", corpus_hash="c", template_hash="t", bos_policy="one", max_tokens_per_item=64,
        truncated_items=0, dtype="float32", classes=("a",), questions=(Question("q", "a", 100, 1.0),),
        layers=tuple(range(6)), experts=8, top_k=2, stack={},
    )  # fmt: skip
    save_statistics_index(folder, meta, files)
    return folder


EVEN = np.full(8, 25)
