"""The largest keys and values of an observation, one decoder layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.statistics import StatisticsIndex, open_layer
from gemcut.types import F32

_NAMES = ("cache.k.amax", "cache.v.amax")


@dataclass(frozen=True, slots=True, eq=False)
class CachePeaks:
    """k, v: the largest |k| and |v| of every KV head, float32 [H], keys normed and rotated, values normed."""

    k: F32
    v: F32


def load_cache_peaks(folder: Path, index: StatisticsIndex, layer: int) -> CachePeaks:
    """Of one layer.

    Raises:
        UsageError: the observation has no such layer, or was made before these were kept.
        CheckpointError: the file is missing or damaged, or a value cannot be a size.
    """
    with open_layer(folder, index, layer) as (f, where):
        if not set(_NAMES) <= set(f.keys()):
            raise UsageError(
                "the statistics do not say how large keys and values are",
                where=where,
                hint="observe again: gemcut observe",
            )
        found = []
        for name in _NAMES:
            ref = f.get_slice(name)
            form = (str(ref.get_dtype()), len(ref.get_shape()))
            if form != ("F32", 1):
                raise CheckpointError(f"{name} has another form", where=where, got=form, wanted=("F32", 1))
            found.append(f.get_tensor(name))
    keys, values = found
    if keys.shape != values.shape or not keys.size:
        raise CheckpointError("keys and values have other numbers of heads", where=where, got=(keys.size, values.size))
    if not all(np.isfinite(x).all() and (x >= 0).all() for x in found):
        raise CheckpointError("the size of a key or value is no size", where=where, hint="observe again")
    return CachePeaks(keys, values)
