"""A folder of curvature: `curvature.json` and `curvature.safetensors`, one written for the other.

curvature.safetensors   `<tensor>.rows` F64 [U, R], `<tensor>.columns` F64 [U, F], the tensor's name on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemcut.errors import CheckpointError
from gemcut.records.arrays import SHA256, beside, open_arrays, save_arrays
from gemcut.records.fields import open_record
from gemcut.store import fingerprint
from gemcut.types import F64, Json

CURVATURE_SCHEMA = 1
CURVATURE_FILE = "curvature.json"
_ROWS, _COLUMNS = ".rows", ".columns"
_MAX_TENSORS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Margins:
    """Sums of squared gradients of one matrix, or of U stacked ones: rows [U, R], columns [U, F], float64.

    Both add up to the same total in every unit.
    """

    rows: F64
    columns: F64

    def __post_init__(self) -> None:
        units = self.rows.shape[:1]
        if self.rows.ndim != 2 or self.columns.ndim != 2 or self.columns.shape[:1] != units:
            raise CheckpointError("margins of other forms", got=(self.rows.shape, self.columns.shape))
        for part in (self.rows, self.columns):
            if not np.isfinite(part).all() or (part.size and part.min() < 0):
                raise CheckpointError("sums of squares that are negative, or no numbers")


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """How the model's answers change with each weight: by tensor's name on disk, in nats of KLD per squared change.

    tokens: predictions that the sums run over.   draws: answers drawn for each.
    """

    tensors: Mapping[str, Margins]
    tokens: int
    draws: int
    items: int
    dtype: str
    seed: int
    model_fingerprint: str
    corpus_hash: str
    fingerprint: str = ""


def save_curvature(curvature: Curvature, folder: Path, *, force: bool = False) -> None:
    """Write a curvature folder.

    Raises:
        UsageError: `folder` exists and `force` is not given.
    """
    arrays = {}
    for name, one in curvature.tensors.items():
        arrays[name + _ROWS] = one.rows
        arrays[name + _COLUMNS] = one.columns
    body: dict[str, Json] = {
        "schema": CURVATURE_SCHEMA,
        "tokens": curvature.tokens,
        "draws": curvature.draws,
        "items": curvature.items,
        "dtype": curvature.dtype,
        "seed": curvature.seed,
        "model": curvature.model_fingerprint,
        "corpus": curvature.corpus_hash,
    }
    save_arrays(folder, CURVATURE_FILE, arrays, body, force=force)


def load_curvature(folder: Path) -> Curvature:
    """Read a curvature folder.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: wrong types, another schema, changed values, or values that no sums of squares can have.
    """
    f = open_record(folder / CURVATURE_FILE, "curvature", CURVATURE_SCHEMA)
    digest = f.digest(SHA256)
    out = Curvature(
        tensors=_read(beside(folder / CURVATURE_FILE), digest),
        tokens=f.count("tokens", 1),
        draws=f.count("draws", 1),
        items=f.count("items", 1),
        dtype=f.text("dtype"),
        seed=f.count("seed"),
        model_fingerprint=f.text("model", empty=False),
        corpus_hash=f.text("corpus"),
        fingerprint=fingerprint({"values": digest}),
    )
    f.done()
    return out


def _read(path: Path, digest: str) -> dict[str, Margins]:
    hint = "make it again from the same model and corpus"
    with open_arrays(path, digest, "curvature's values") as f:
        names = set(f.keys())
        stems = sorted(name.removesuffix(_ROWS) for name in names if name.endswith(_ROWS))
        wanted = {stem + part for stem in stems for part in (_ROWS, _COLUMNS)}
        if names != wanted or not stems or len(stems) > _MAX_TENSORS:
            raise CheckpointError("rows without columns, or columns without rows", where=path.name, hint=hint)
        for name in names:
            part = f.get_slice(name)
            if str(part.get_dtype()) != "F64" or len(part.get_shape()) != 2:
                raise CheckpointError(f"{name[:200]} has another form", where=path.name, hint=hint)
        return {stem: Margins(f.get_tensor(stem + _ROWS), f.get_tensor(stem + _COLUMNS)) for stem in stems}
