"""A scores folder: `scores.json` and `scores.safetensors`, one written for the other."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from gemcut.records.arrays import SHA256, beside, read_arrays, save_arrays
from gemcut.records.fields import open_record, to_json
from gemcut.records.plans import MAX_LAYERS, MAX_UNITS
from gemcut.types import Json, Kind, Scores

SCORES_SCHEMA = 1
SCORES_FILE = "scores.json"


def save_scores(scores: Scores, folder: Path, *, force: bool = False) -> None:
    """Write a scores folder.

    Raises:
        UsageError: `folder` exists and `force` is not given.
    """
    tensors = {"values": np.asarray(scores.values, np.float64)}
    if scores.protected is not None:
        tensors["protected"] = np.asarray(scores.protected, np.uint8)
    if scores.per_class is not None:
        tensors["per_class"] = np.asarray(scores.per_class, np.float64)
    body: dict[str, Json] = {
        "schema": SCORES_SCHEMA,
        "criterion": scores.criterion,
        "params": to_json(scores.params),
        "kind": scores.kind,
        "layers": list(scores.layers),
        "units": scores.units,
        "model": scores.model_fingerprint,
        "statistics": scores.statistics_fingerprint,
        "corpus": scores.corpus_hash,
        "classes": list(scores.classes),
        "why": scores.why,
    }
    save_arrays(folder, SCORES_FILE, tensors, body, force=force)


def load_scores(folder: Path) -> Scores:
    """Read a scores folder.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: the two files disagree, or the values are not of the recorded shape.
        QualityError: a value is not finite.
    """
    f = open_record(folder / SCORES_FILE, "scores", SCORES_SCHEMA)
    layers = f.counts("layers", MAX_LAYERS, distinct=True)
    units = f.count("units", 1, MAX_UNITS)
    classes = f.texts("classes", distinct=True)
    kind = f.text("kind")
    if kind not in ("experts", "heads"):
        f.refuse("kind", kind, "experts or heads")
    forms = {
        "values": ("F64", (len(layers), units)),
        "protected": ("U8", (len(layers), units)),
        "per_class": ("F64", (len(classes), len(layers), units)),
    }
    tensors = read_arrays(beside(folder / SCORES_FILE), f.digest(SHA256), forms, "scores")
    scores = Scores(
        criterion=f.text("criterion", empty=False),
        params=f.mapping("params"),
        kind=cast(Kind, kind),
        layers=layers,
        values=tensors["values"],
        model_fingerprint=f.text("model"),
        statistics_fingerprint=f.text("statistics"),
        corpus_hash=f.text("corpus"),
        protected=tensors["protected"].astype(np.bool_) if "protected" in tensors else None,
        why=f.text("why"),
        classes=classes,
        per_class=tensors.get("per_class"),
    )
    f.done()
    return scores
