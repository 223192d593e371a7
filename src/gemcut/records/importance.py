"""A folder of head importance: `importance.json` and `importance.safetensors`, one written for the other."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from gemcut.errors import CheckpointError
from gemcut.records.arrays import SHA256, beside, read_arrays, save_arrays
from gemcut.records.fields import open_record
from gemcut.records.plans import MAX_LAYERS, MAX_UNITS
from gemcut.types import HeadImportance, ImportanceMethod, Json

IMPORTANCE_SCHEMA = 1
IMPORTANCE_FILE = "importance.json"


def save_importance(importance: HeadImportance, folder: Path, *, force: bool = False) -> None:
    """Write an importance folder.

    Raises:
        UsageError: `folder` exists and `force` is not given.
    """
    arrays = {"values": importance.values, "per_class": importance.per_class}
    if importance.stderr is not None:
        arrays["stderr"] = importance.stderr
    body: dict[str, Json] = {
        "schema": IMPORTANCE_SCHEMA,
        "method": importance.method,
        "layers": list(importance.layers),
        "units": importance.units,
        "classes": list(importance.classes),
        "model": importance.model_fingerprint,
        "corpus": importance.corpus_hash,
        "template": importance.template_hash,
        "dtype": importance.dtype,
        "tokens": importance.tokens,
        "items": importance.items,
    }
    found = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    save_arrays(folder, IMPORTANCE_FILE, found, body, force=force)


def load_importance(folder: Path) -> HeadImportance:
    """Read an importance folder.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: wrong types, another schema, arrays of another form than recorded, or a negative error.
        QualityError: a value is not finite.
    """
    f = open_record(folder / IMPORTANCE_FILE, "head importance", IMPORTANCE_SCHEMA)
    layers = f.counts("layers", MAX_LAYERS, distinct=True)
    if not layers or list(layers) != sorted(layers):
        f.refuse("layers", list(layers), "ascending layers")
    units = f.count("units", 1, MAX_UNITS)
    classes = f.texts("classes", distinct=True)
    method = f.text("method")
    if method not in ("loo", "taylor"):
        f.refuse("method", method, "loo or taylor")
    grid = (len(layers), units)
    forms = {"values": ("F64", grid), "stderr": ("F64", grid), "per_class": ("F64", (len(classes), *grid))}
    arrays = read_arrays(beside(folder / IMPORTANCE_FILE), f.digest(SHA256), forms, "importance values")
    stderr = arrays.get("stderr")
    if "per_class" not in arrays or (stderr is not None and bool((stderr < 0).any())):
        raise CheckpointError(
            "the importance has no values per class, or a standard error below zero",
            where=beside(folder / IMPORTANCE_FILE).name,
            hint="run the ablation again",
        )
    out = HeadImportance(
        method=cast(ImportanceMethod, method),
        layers=layers,
        values=arrays["values"],
        stderr=stderr,
        classes=classes,
        per_class=arrays["per_class"],
        model_fingerprint=f.text("model", empty=False),
        corpus_hash=f.text("corpus"),
        template_hash=f.text("template"),
        dtype=f.text("dtype"),
        tokens=f.count("tokens", 1),
        items=f.count("items", 1),
    )
    f.done()
    return out
