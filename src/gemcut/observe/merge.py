"""Observations of one model on several corpora are one observation of all: sums add, maxima take the larger."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gemcut.errors import CheckpointError, UsageError
from gemcut.observe.folder import REQUEST_FILE, save_layer
from gemcut.records.statistics import LayerFile, load_statistics_index, save_statistics_index
from gemcut.store import atomic_folder, fingerprint, need_disk, read_json, sha256_file, write_json
from gemcut.types import Json, StatisticsMeta

Progress = Callable[[int, int, str], None]

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


def merge(parts: Sequence[Path], out: Path, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Merge two or more statistics folders into one, layer by layer, linear and Gram sums included.

    Memory holds two parts of one layer. Merging is associative up to the rounding of float64 sums.

    Args:
        progress: called with (layers done, layers, label).
    Raises:
        UsageError: fewer than two, they do not add up (see `merge_meta`), or `out` exists and not `force`.
        CheckpointError: a folder is damaged.
    """
    if len(parts) < 2:
        raise UsageError("two observations are needed to merge", got=len(parts))
    read = [(folder, load_statistics_index(folder)) for folder in parts]
    metas = list(accumulate((index.meta for _, index in read), merge_meta))
    requests = [read_json(folder / REQUEST_FILE, "observation") for folder in parts]
    layers = [one.layer for one in read[0][1].layers]
    for folder, index in read[1:]:
        if [one.layer for one in index.layers] != layers:
            raise CheckpointError("observations of one model have different layers", where=folder.name)
    need_disk(out, sum((folder / one.file).stat().st_size for folder, index in read for one in index.layers))
    with atomic_folder(out, force=force) as folder:
        files = []
        for i, layer in enumerate(layers):
            sums, aliases = _load(read[0][0], read[0][1].layers[i])
            for k in range(1, len(read)):
                more, _ = _load(read[k][0], read[k][1].layers[i])
                sums = _add(layer, (sums, metas[k - 1]), (more, read[k][1].meta), metas[k])
            files.append(save_layer(folder, layer, sums, aliases))
            if progress is not None:
                progress(i + 1, len(layers), f"layer {layer}")
        whole: list[Json] = [request.get("fingerprint") for request in requests]
        body: dict[str, Json] = {
            "schema": 1, "fingerprint": fingerprint({"merged": whole}), "merged": whole,
            "aliases": requests[0].get("aliases"),
        }  # fmt: skip
        write_json(folder / REQUEST_FILE, body)
        save_statistics_index(folder, metas[-1], files)
    return out


_Part = tuple[Mapping[str, torch.Tensor], StatisticsMeta]


def _add(layer: int, a: _Part, b: _Part, meta: StatisticsMeta) -> dict[str, torch.Tensor]:
    """Sums of one layer over both parts; `meta` is that of both."""
    (left, first), (right, second) = a, b
    if left.keys() != right.keys():
        raise CheckpointError(
            "two observations of one layer hold different sums",
            where=f"layer {layer}",
            got=", ".join(sorted(left.keys() ^ right.keys()))[:120],
        )
    row = {name: i for i, name in enumerate(meta.classes)}
    at = [[row[cls] for cls in part.classes] for part in (first, second)]
    out: dict[str, torch.Tensor] = {}
    for name, x in left.items():
        y = right[name]
        largest = name.endswith((".amax", ".f_max"))
        if name.startswith("experts.by_question.") or name in ("near.sample_index", "near.sample_logit"):
            out[name] = torch.cat([x, y])
        elif name == "near.sample_token":
            out[name] = torch.cat([x, y + first.tokens])
        elif name.startswith("experts.by_class."):
            sums = torch.zeros((len(row), x.shape[1]), dtype=x.dtype)
            sums[at[0]] = x
            sums[at[1]] = torch.maximum(sums[at[1]], y) if largest else sums[at[1]] + y
            out[name] = sums
        elif name.startswith("gram."):
            out[name] = _add_splits(x, y)
        else:
            out[name] = torch.maximum(x, y) if largest else x + y
    return out


def _add_splits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y if x.shape == y.shape else x.sum(0, keepdim=True) + y.sum(0, keepdim=True)


def _load(folder: Path, one: LayerFile) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    path = folder / one.file
    if not path.is_file() or sha256_file(path) != one.sha256:
        raise CheckpointError(
            "a layer's statistics are not what was recorded",
            where=f"{folder.name}, layer {one.layer}, {one.file}",
            hint="observe again",
        )
    with safe_open(path, framework="pt") as f:
        said = (f.metadata() or {}).get("aliases", "{}")
    return load_file(path), json.loads(said)
