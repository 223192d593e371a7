"""The statistics folder: `statistics.json` and one safetensors file per layer.

statistics.json   {"schema": 1, "fingerprint": hex, "meta": {…}, "layers": [{"layer": 0, "file": …, "sha256": …}, …]}
layer-000.safetensors
    experts.by_class.<sum>     F64 [C, E]
    experts.by_question.<sum>  F32 [Q, E]
    gram.* linear.* cache.*    of one layer at a time, when asked for: `records.gram`, `.linears`, `.cache`
    near.*                     not read here: with those, a thousand times larger than the expert sums
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.fields import Fields, open_record, to_json
from gemcut.store import fingerprint, sha256_file, write_json
from gemcut.types import (
    EXPERT_MAXIMA,
    EXPERT_SUMS,
    F32,
    F64,
    QUESTION_SUMS,
    Json,
    Question,
    Statistics,
    StatisticsMeta,
)

STATISTICS_SCHEMA = 1
STATISTICS_FILE = "statistics.json"
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 16
# Norms and counts cannot be negative; weighted sums may be, where a router's scale is.
_NEVER_NEGATIVE = frozenset({"n", "f", "f2", "gf2", "f_max"})
_Array: TypeAlias = "NDArray[np.float64] | NDArray[np.float32]"


@dataclass(frozen=True, slots=True)
class LayerFile:
    """One layer's file in a statistics folder."""

    layer: int
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StatisticsIndex:
    """`statistics.json`: what was observed, and where each layer lies."""

    meta: StatisticsMeta
    fingerprint: str
    layers: tuple[LayerFile, ...]


def meta_to_json(meta: StatisticsMeta) -> dict[str, Json]:
    """StatisticsMeta as it stands in `statistics.json`."""
    return cast("dict[str, Json]", to_json(meta))


def save_statistics_index(
    folder: Path, meta: StatisticsMeta, layers: Sequence[LayerFile], fingerprint_hex: str | None = None
) -> str:
    """Write `statistics.json` after all layer files are on disk; returns the fingerprint.

    Without `fingerprint_hex` the fingerprint is the sha256 of the meta and of every layer file's sha256.
    """
    files: list[Json] = [{"layer": one.layer, "file": one.file, "sha256": one.sha256} for one in layers]
    digest = fingerprint_hex or fingerprint({"meta": meta_to_json(meta), "layers": files})
    body = {"schema": STATISTICS_SCHEMA, "fingerprint": digest, "meta": meta_to_json(meta), "layers": files}
    write_json(folder / STATISTICS_FILE, body)
    return digest


def load_statistics_index(folder: Path) -> StatisticsIndex:
    """Read `statistics.json` alone: milliseconds, whatever the folder weighs.

    Raises:
        UsageError: there is no such file.
        CheckpointError: wrong types, another schema, a hostile file name, or layers that the meta does not explain.
    """
    f = open_record(folder / STATISTICS_FILE, "statistics", STATISTICS_SCHEMA)
    meta = _read_meta(f.child("meta"))
    layers = f.children("layers", _read_layer_file)
    for what, values in (("layer", [one.layer for one in layers]), ("file", [one.file for one in layers])):
        if len(set(values)) != len(values):
            f.refuse("layers", f"a {what} twice", f"every {what} once")
    if missing := sorted(set(meta.layers) - {one.layer for one in layers}):
        f.refuse("layers", f"no file for layer {missing[0]}", "a file for every layer that has experts")
    index = StatisticsIndex(meta=meta, fingerprint=f.digest("fingerprint"), layers=layers)
    f.done()
    return index


def load_index_of(folder: Path, model_fingerprint: str) -> StatisticsIndex:
    """As `load_statistics_index`, for statistics that must be of this very checkpoint.

    Raises:
        CheckpointError: they were observed on another one.
    """
    index = load_statistics_index(folder)
    if index.meta.model_fingerprint != model_fingerprint:
        raise CheckpointError(
            "the statistics were observed on another checkpoint",
            where=folder.name,
            got=f"{index.meta.model_name}, fingerprint {index.meta.model_fingerprint[:12]}",
            wanted=model_fingerprint[:12],
            hint="observe this one: gemcut observe",
        )
    return index


@contextlib.contextmanager
def open_layer(
    folder: Path, index: StatisticsIndex, layer: int, *, check_hash: bool = False
) -> Iterator[tuple[Any, str]]:
    """One layer's file, open, and what to call it in an error.

    Args:
        check_hash: compare the file with its recorded sha256, which reads all of it, Gram matrices too.
    Raises:
        UsageError: the observation has no such layer.
        CheckpointError: the file is missing, truncated or changed; whatever goes wrong while it is read.
    """
    one = next((one for one in index.layers if one.layer == layer), None)
    if one is None:
        raise UsageError("the observation has no such layer", got=layer, wanted=f"{len(index.layers)} layers")
    path, where = folder / one.file, f"layer {layer}, {one.file}"
    if check_hash:
        _check_hash(path, one, where)
    try:
        with safe_open(path, framework="numpy") as f:
            yield f, where
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read a layer's statistics: {error}", where=where) from None


def _check_hash(path: Path, one: LayerFile, where: str) -> None:
    if not path.is_file():
        raise CheckpointError("a layer's statistics are missing", where=where, hint="run observe again")
    if (found := sha256_file(path)) != one.sha256:
        raise CheckpointError(
            "a layer's statistics are not what was recorded",
            where=where,
            got=f"sha256 {found[:12]}…",
            wanted=f"{one.sha256[:12]}…",
            hint="the file was truncated, renamed, or comes from another run: observe again",
        )


def _read_layer_file(f: Fields) -> LayerFile:
    out = LayerFile(layer=f.count("layer", 0, MAX_LAYERS), file=f.file_name("file"), sha256=f.digest("sha256"))
    f.done()
    return out


def _read_question(f: Fields) -> Question:
    out = Question(
        id=f.text("id", empty=False),
        cls=f.text("cls", empty=False),
        tokens=f.count("tokens"),
        weight=f.number("weight"),
    )
    if out.weight < 0:
        f.refuse("weight", out.weight, "a weight of 0 or more")
    f.done()
    return out


def _read_meta(f: Fields) -> StatisticsMeta:
    stack = f.child("stack")
    meta = StatisticsMeta(
        schema=f.count("schema", STATISTICS_SCHEMA, STATISTICS_SCHEMA),
        model_fingerprint=f.text("model_fingerprint", empty=False),
        model_name=f.text("model_name"),
        family=f.text("family"),
        corpus_hash=f.text("corpus_hash"),
        template_hash=f.text("template_hash"),
        bos_policy=f.text("bos_policy"),
        max_tokens_per_item=f.count("max_tokens_per_item"),
        truncated_items=f.count("truncated_items"),
        dtype=f.text("dtype"),
        classes=f.texts("classes", distinct=True),
        questions=f.children("questions", _read_question),
        layers=f.counts("layers", MAX_LAYERS, distinct=True),
        experts=f.count("experts", 0, MAX_EXPERTS),
        top_k=f.count("top_k", 0, MAX_EXPERTS),
        stack={key: stack.text(key) for key in stack.names()},
    )
    f.done()
    for i, question in enumerate(meta.questions):
        if question.cls not in meta.classes:
            f.refuse(f"questions[{i}].cls", question.cls, "one of meta.classes")
    if list(meta.layers) != sorted(meta.layers):
        f.refuse("layers", list(meta.layers), "ascending layers")
    if meta.layers and not 1 <= meta.top_k <= meta.experts:
        f.refuse("top_k", meta.top_k, f"1 to {meta.experts} (the number of experts)")
    return meta


def load_statistics(folder: Path, *, check_hashes: bool = True) -> Statistics:
    """The expert sums of a statistics folder, checked and whole.

    Shapes: `by_class[name]` float64 [C, L, E], `by_question[name]` float32 [Q, L, E]. A dense model has L = 0.

    Args:
        check_hashes: compare every layer file with its recorded sha256, which reads all of it. Without it only the
            expert sums are read.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: a layer file is missing, truncated, another layer's, holds what cannot have been summed, or
            counts that do not add up to the router's top-k per token.
    """
    index = load_statistics_index(folder)
    meta = index.meta
    files = {one.layer: one for one in index.layers}
    c, n_layers, e, q = len(meta.classes), len(meta.layers), meta.experts, len(meta.questions)
    _check_size(folder, index)
    by_class: dict[str, F64] = {name: np.zeros((c, n_layers, e), np.float64) for name in (*EXPERT_SUMS, *EXPERT_MAXIMA)}
    by_question: dict[str, F32] = {name: np.zeros((q, n_layers, e), np.float32) for name in QUESTION_SUMS}
    for row, layer in enumerate(meta.layers):
        tensors = _read_layer(folder, files[layer], (c, q, e), check_hashes=check_hashes)
        for name, into in by_class.items():
            into[:, row] = tensors[f"experts.by_class.{name}"]
        for name, into32 in by_question.items():
            into32[:, row] = tensors[f"experts.by_question.{name}"]
    _check_counts(meta, by_class["n"])
    return Statistics(meta=meta, fingerprint=index.fingerprint, by_class=by_class, by_question=by_question)


def _check_counts(meta: StatisticsMeta, n: F64) -> None:
    """Σ_e n[c, l, e] = top_k · tokens of class c, in every layer: no token was lost, and none counted twice."""
    for c, cls in enumerate(meta.classes):
        wanted = meta.top_k * sum(q.tokens for q in meta.questions if q.cls == cls)
        for layer, found in zip(meta.layers, n[c].sum(axis=1), strict=True):
            if abs(found - wanted) > 0.5:
                raise CheckpointError(
                    "the routed tokens do not add up",
                    where=f"layer {layer}, class {cls!r}",
                    got=f"{found:g} routed",
                    wanted=f"top-{meta.top_k} of {wanted // meta.top_k} tokens = {wanted}",
                    hint="the file and its description come from different runs: observe again",
                )


def _check_size(folder: Path, index: StatisticsIndex) -> None:
    """Allocate nothing that the files on disk cannot fill."""
    meta = index.meta
    rows = 8 * len(meta.classes) * (len(EXPERT_SUMS) + len(EXPERT_MAXIMA))
    rows += 4 * len(meta.questions) * len(QUESTION_SUMS)
    for one in index.layers:
        if one.layer not in meta.layers:
            continue
        path = folder / one.file
        if not path.is_file():
            raise CheckpointError(
                "a layer's statistics are missing",
                where=f"layer {one.layer}, {one.file}",
                hint="run observe again: finished layers are kept",
            )
        if path.stat().st_size < rows * meta.experts:
            raise CheckpointError(
                "a layer's statistics are truncated",
                where=f"layer {one.layer}, {one.file}",
                got=f"{path.stat().st_size} bytes",
                wanted=f"at least {rows * meta.experts}",
                hint="observe again into a new folder",
            )


def _read_layer(
    folder: Path, one: LayerFile, sizes: tuple[int, int, int], *, check_hashes: bool
) -> Mapping[str, _Array]:
    c, q, e = sizes
    path = folder / one.file
    where = f"layer {one.layer}, {one.file}"
    if check_hashes:
        _check_hash(path, one, where)
    wanted: dict[str, tuple[str, list[int]]] = {
        f"experts.by_class.{name}": ("F64", [c, e]) for name in (*EXPERT_SUMS, *EXPERT_MAXIMA)
    }
    wanted |= {f"experts.by_question.{name}": ("F32", [q, e]) for name in QUESTION_SUMS}
    out: dict[str, _Array] = {}
    try:
        with safe_open(path, framework="numpy") as f:
            names = set(f.keys())
            for name, (dtype, shape) in wanted.items():
                if name not in names:
                    raise CheckpointError(f"{name} is missing", where=where, hint="observe again")
                ref = f.get_slice(name)
                found_form = (str(ref.get_dtype()), list(ref.get_shape()))
                if found_form != (dtype, shape):
                    raise CheckpointError(
                        f"{name} has another form", where=where, got=found_form, wanted=(dtype, shape)
                    )
                out[name] = _check_values(f.get_tensor(name), name, where)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read a layer's statistics: {error}", where=where) from None
    return out


def _check_values(values: _Array, name: str, where: str) -> _Array:
    """A non-finite or impossible sum must never be ranked: it would sort first or last, and look like a score."""
    bad = ~np.isfinite(values)
    if not bad.any() and name.rsplit(".", 1)[1] in _NEVER_NEGATIVE:
        bad = values < 0
    if bad.any():
        row, expert = (int(v) for v in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{name} holds {int(bad.sum())} impossible values",
            where=f"{where}, row {row}, expert {expert}",
            got=float(values[row, expert]),
            wanted="finite sums, counts and norms of 0 or more",
            hint="observe again: a non-finite statistic must never be ranked",
        )
    return values
