"""The Gram matrix of one linear's inputs, as an observation keeps it: one decoder layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.statistics import StatisticsIndex, open_layer
from gemcut.types import F64

ATTENTION_OUT = "self_attn.o_proj"  # the linear whose inputs' Gram matrix an observation keeps


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """Sums over the tokens that went into one linear's Gram matrix; x_t its inputs, w_t = 1 / (mean(y_t²) + eps).

    g = Σ w_t x_t x_tᵀ [d, d]   x = Σ w_t x_t [d]   w = Σ w_t   n = Σ 1, float64. `splits`: parts that are on disk.
    """

    g: F64
    x: F64
    w: float
    n: int
    splits: int


def load_gram(
    folder: Path,
    index: StatisticsIndex,
    layer: int,
    module: str = ATTENTION_OUT,
    *,
    split: int | None = None,
    check_hash: bool = False,
) -> Gram:
    """One layer's Gram matrix and its sums, nothing else of the folder.

    Args:
        split: one part of the corpus (halves by the parity of the question's index); None adds up all parts. A wide
            layer has a single part, see `Gram.splits`.
        check_hash: compare the layer's file with its recorded sha256, which reads all of it.

    Raises:
        UsageError: the observation has no such layer, no Gram matrix of this module, or no such part.
        CheckpointError: the file is missing or changed, or the sums have another form or are not finite.
    """
    prefix = f"gram.{module}"
    with open_layer(folder, index, layer, check_hash=check_hash) as (f, where):
        if f"{prefix}.g" not in set(f.keys()):
            raise UsageError(
                f"the statistics hold no Gram matrix of {module}",
                where=where,
                hint="observe again with this version: gemcut observe",
            )
        parts = _gram_parts(f, prefix, split, where)
        stored = f.get_slice(f"{prefix}.g")
        g: F64 = stored[parts[0] : parts[0] + 1][0]  # no copy: a wide layer has one part of gigabytes
        for part in parts[1:]:
            g = g + stored[part : part + 1][0]
        x, w, n = (f.get_tensor(f"{prefix}.{key}")[list(parts)].sum(axis=0) for key in ("x", "w", "n"))
        splits = int(stored.get_shape()[0])
    # a sum is not finite as soon as one entry is not; a mask as large as the matrix is not needed
    if not (np.isfinite(g.sum()) and np.isfinite(x).all() and np.isfinite(w) and n >= 0) or (g.diagonal() < 0).any():
        raise CheckpointError("the Gram matrix holds impossible values", where=where, hint="observe again")
    return Gram(g=g, x=x, w=float(w), n=int(n), splits=splits)


def _gram_parts(f: Any, prefix: str, split: int | None, where: str) -> tuple[int, ...]:
    """Check the forms of g [S, d, d], x [S, d], w [S] and n [S]; the parts to add up."""
    forms = {}
    names = set(f.keys())
    for key in ("g", "x", "w", "n"):
        name = f"{prefix}.{key}"
        if name not in names:
            raise CheckpointError(f"{name} is missing", where=where, hint="observe again")
        forms[key] = (str(f.get_slice(name).get_dtype()), list(f.get_slice(name).get_shape()))
    shape = forms["g"][1]
    s, d = (shape[0], shape[1]) if len(shape) == 3 else (0, 0)
    wanted = {"g": ("F64", [s, d, d]), "x": ("F64", [s, d]), "w": ("F64", [s]), "n": ("F64", [s])}
    if s < 1 or forms != wanted:
        raise CheckpointError(f"{prefix} has another form", where=where, got=forms, wanted=wanted)
    if split is not None and not 0 <= split < s:
        raise UsageError("the Gram matrix has no such part", where=where, got=split, wanted=f"0 to {s - 1}")
    return tuple(range(s)) if split is None else (split,)
