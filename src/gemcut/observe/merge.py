"""Two observations of one model on two corpora are one observation of both: sums add, maxima take the larger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gemcut.errors import CheckpointError, UsageError
from gemcut.observe.folder import REQUEST_FILE, save_layer
from gemcut.records.statistics import LayerFile, StatisticsIndex, load_statistics_index, save_statistics_index
from gemcut.store import atomic_folder, fingerprint, read_json, sha256_file, write_json
from gemcut.types import EXPERT_MAXIMA, EXPERT_SUMS, F32, F64, QUESTION_SUMS, Json, Statistics, StatisticsMeta

# What may differ between two observations that are merged: the corpus, and what follows from it.
_OF_THE_CORPUS = {
    "corpus_hash", "questions", "classes", "truncated_items", "max_tokens_per_item", "model_name",
}  # fmt: skip


def merge_meta(a: StatisticsMeta, b: StatisticsMeta) -> StatisticsMeta:
    """The meta of both.

    Raises:
        UsageError: model, dtype, template, BOS policy, geometry or package versions differ, or a question is in both.
    """
    for field in fields(StatisticsMeta):
        name = field.name
        if name not in _OF_THE_CORPUS and getattr(a, name) != getattr(b, name):
            raise UsageError(
                f"two observations with different {name} do not add up",
                got=str(getattr(b, name))[:80],
                wanted=str(getattr(a, name))[:80],
                hint="observe both corpora with the same model, settings and package versions",
            )
    if twice := sorted({q.id for q in a.questions} & {q.id for q in b.questions}):
        raise UsageError(f"{len(twice)} questions are in both observations", where=f"question {twice[0]!r}")
    return replace(
        a,
        corpus_hash=fingerprint({"merged": [a.corpus_hash, b.corpus_hash]}),
        questions=a.questions + b.questions,
        classes=tuple(sorted({*a.classes, *b.classes})),
        truncated_items=a.truncated_items + b.truncated_items,
        max_tokens_per_item=max(a.max_tokens_per_item, b.max_tokens_per_item),
    )


def merge_statistics(a: Statistics, b: Statistics) -> Statistics:
    """In memory: by_class float64 [C', L, E], by_question float32 [Qa + Qb, L, E]. Raises as `merge_meta`."""
    meta = merge_meta(a.meta, b.meta)
    row = {name: i for i, name in enumerate(meta.classes)}
    by_class: dict[str, F64] = {}
    for name in (*EXPERT_SUMS, *EXPERT_MAXIMA):
        out = np.zeros((len(row), *a.by_class[name].shape[1:]))
        for part in (a, b):
            at = [row[cls] for cls in part.meta.classes]
            old = out[at]
            out[at] = np.maximum(old, part.by_class[name]) if name in EXPERT_MAXIMA else old + part.by_class[name]
        by_class[name] = out
    by_question: dict[str, F32] = {n: np.concatenate([a.by_question[n], b.by_question[n]]) for n in QUESTION_SUMS}
    return Statistics(meta, fingerprint({"merged": [a.fingerprint, b.fingerprint]}), by_class, by_question)


def merge(a: Path, b: Path, out: Path, *, force: bool = False) -> Path:
    """Merge two statistics folders into a third, layer by layer, linear and Gram sums included.

    Raises:
        UsageError: they do not add up (see `merge_meta`), or `out` exists and not `force`.
        CheckpointError: a folder is damaged.
    """
    first, second = load_statistics_index(a), load_statistics_index(b)
    meta = merge_meta(first.meta, second.meta)
    requests = [read_json(folder / REQUEST_FILE, "observation") for folder in (a, b)]
    layers = [one.layer for one in first.layers]
    if layers != [one.layer for one in second.layers]:
        raise CheckpointError("two observations of one model have different layers", where=str(b))
    with atomic_folder(out, force=force) as folder:
        files = [
            _merge_layer(folder, (a, first, x), (b, second, y), meta)
            for x, y in zip(first.layers, second.layers, strict=True)
        ]
        both: list[Json] = [request.get("fingerprint") for request in requests]
        body: dict[str, Json] = {
            "schema": 1, "fingerprint": fingerprint({"merged": both}), "merged": both,
            "aliases": requests[0].get("aliases"),
        }  # fmt: skip
        write_json(folder / REQUEST_FILE, body)
        save_statistics_index(folder, meta, files)
    return out


_Part = tuple[Path, StatisticsIndex, LayerFile]


def _merge_layer(folder: Path, a: _Part, b: _Part, meta: StatisticsMeta) -> LayerFile:
    (left, aliases), (right, _) = _load(a), _load(b)
    if left.keys() != right.keys():
        raise CheckpointError(
            "two observations of one layer hold different sums",
            where=f"layer {a[2].layer}",
            got=", ".join(sorted(left.keys() ^ right.keys()))[:120],
        )
    row = {name: i for i, name in enumerate(meta.classes)}
    at = [[row[cls] for cls in index.meta.classes] for _, index, _ in (a, b)]
    out: dict[str, torch.Tensor] = {}
    for name, x in left.items():
        y = right[name]
        largest = name.endswith((".amax", ".f_max"))
        if name.startswith("experts.by_question.") or name in ("near.sample_index", "near.sample_logit"):
            out[name] = torch.cat([x, y])
        elif name == "near.sample_token":
            out[name] = torch.cat([x, y + a[1].meta.tokens])
        elif name.startswith("experts.by_class."):
            sums = torch.zeros((len(row), x.shape[1]), dtype=x.dtype)
            sums[at[0]] = x
            sums[at[1]] = torch.maximum(sums[at[1]], y) if largest else sums[at[1]] + y
            out[name] = sums
        elif name.startswith("gram."):
            out[name] = _add_splits(x, y)
        else:
            out[name] = torch.maximum(x, y) if largest else x + y
    return save_layer(folder, a[2].layer, out, aliases)


def _add_splits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y if x.shape == y.shape else x.sum(0, keepdim=True) + y.sum(0, keepdim=True)


def _load(part: _Part) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    folder, _, one = part
    path = folder / one.file
    if not path.is_file() or sha256_file(path) != one.sha256:
        raise CheckpointError(
            "a layer's statistics are not what was recorded",
            where=f"layer {one.layer}, {one.file}",
            hint="observe again",
        )
    with safe_open(path, framework="pt") as f:
        said = (f.metadata() or {}).get("aliases", "{}")
    return load_file(path), json.loads(said)
