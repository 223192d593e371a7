"""Scales of an FP8 key-value cache, from the norms that every key and value passes or from what was seen in text.

one         1: e4m3 holds 448, and a normed value is at most √D (16 at D = 256, 22.6 at 512)
bound       the least that nothing can overflow: √D · max |w| / 448 for the keys, w the weights of their norm, which a
            rotation does not make longer; √D / 448 for the values, whose norm has no weights
calibrated  max |k| / 448 and max |v| / 448 over the tokens and heads of an observation; what is larger saturates
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.made import Made
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.nvfp4.choices import KvCache, Layout
from gemcut.nvfp4.layout import cache_tensors
from gemcut.records import load_index_of
from gemcut.records.cache import CachePeaks, load_cache_peaks

_LARGEST = 448.0


def cache_scales(
    checkpoint: Checkpoint, kv: KvCache, layout: Layout, statistics: Path | None = None
) -> dict[str, Made]:
    """k and v scale of every layer, to lie beside the norm of its keys.

    Raises:
        UsageError: a layer has no such norm, or what is to be calibrated lacks statistics that say how.
        CheckpointError: the norm is no number; statistics of another model.
        QualityError: what was seen lies outside of what the norms allow.
    """
    if kv == "none":
        return {}
    index = None
    if kv == "calibrated":
        if statistics is None:
            raise UsageError(
                "a calibrated cache wants statistics", where="--kv calibrated",
                hint="gemcut observe MODEL --corpus … -o STATS, then --stats STATS; or --kv bound",
            )  # fmt: skip
        index = load_index_of(statistics, checkpoint.fingerprint)
    out: dict[str, Made] = {}
    for layer in sorted({site.layer for site in checkpoint.sites}):
        attention = checkpoint.family.layer_prefix(checkpoint.tensors, layer) + "self_attn"
        bounds = _bounds(checkpoint, f"{attention}.k_norm.weight")
        if statistics is not None and index is not None:
            values = _seen(load_cache_peaks(statistics, index, layer), bounds, f"layer {layer}")
        else:
            values = (1.0, 1.0) if kv == "one" else (bounds[0] / _LARGEST, bounds[1] / _LARGEST)
        refs = cache_tensors(attention, layout)
        raw = b"".join(_number(value, ref.dtype) for value, ref in zip(values, refs, strict=True))
        out[f"{attention}.k_norm.weight"] = Made(refs, _giving(raw))
    return out


def _bounds(checkpoint: Checkpoint, norm: str) -> tuple[float, float]:
    """No key of the layer is larger, and no value."""
    if norm not in checkpoint.tensors:
        raise UsageError("a layer has no norm of its keys: nothing bounds its cache", where=norm, hint="--kv none")
    weights = decode(checkpoint.ref(norm).dtype, checkpoint.read(norm))
    if weights is None or not weights.size or not np.isfinite(weights).all():
        raise CheckpointError("a norm is no number", where=norm)
    root = math.sqrt(weights.size)
    return root * float(np.abs(weights).max()), root


def _seen(peaks: CachePeaks, bounds: tuple[float, float], where: str) -> tuple[float, float]:
    """Scales of what was seen; bfloat16 may have rounded it a little above what the norm allows."""
    out = []
    for what, found, bound in (("key", peaks.k, bounds[0]), ("value", peaks.v, bounds[1])):
        largest = float(found.max())
        if not 0 < largest <= 1.05 * bound:
            raise QualityError(
                f"the largest {what} of the statistics cannot have been seen", where=where, got=largest,
                wanted=f"above 0, at most {bound:.3g} as its norm has it", hint="observe again, or --kv bound",
            )  # fmt: skip
        out.append(largest / _LARGEST)
    return out[0], out[1]


def _giving(raw: bytes) -> Callable[[], Iterator[memoryview]]:
    return lambda: iter((memoryview(raw),))


def _number(value: float, dtype: str) -> bytes:
    """The least BF16 that is no smaller, in two bytes, or as a float32 in four: both layouts say the same."""
    high = (int(np.float32(value).view(np.uint32)) + 0xFFFF) >> 16
    return high.to_bytes(2, "little") if dtype == "BF16" else (high << 16).to_bytes(4, "little")
