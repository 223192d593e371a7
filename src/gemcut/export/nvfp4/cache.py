"""Scales of an FP8 key-value cache, from the norms that every key and value passes.

one    1: e4m3 holds 448, and a normed value is at most √D (16 at D = 256, 22.6 at 512)
bound  the least that nothing can overflow: √D · max |w| / 448 for the keys, w the weights of their norm, which a
       rotation does not make longer; √D / 448 for the values, whose norm has no weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.made import Made
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, UsageError
from gemcut.nvfp4.layout import KvCache, Layout, cache_tensors

_LARGEST = 448.0


def cache_scales(checkpoint: Checkpoint, kv: KvCache, layout: Layout) -> dict[str, Made]:
    """k and v scale of every layer, to lie beside the norm of its keys.

    Raises:
        UsageError: a layer has no such norm.
        CheckpointError: the norm is no number.
    """
    out: dict[str, Made] = {}
    for layer in sorted({site.layer for site in checkpoint.sites}):
        attention = checkpoint.family.layer_prefix(checkpoint.tensors, layer) + "self_attn"
        norm = f"{attention}.k_norm.weight"
        if norm not in checkpoint.tensors:
            raise UsageError("a layer has no norm of its keys: nothing bounds its cache", where=norm, hint="--kv none")
        weights = decode(checkpoint.ref(norm).dtype, checkpoint.read(norm))
        if weights is None or not weights.size or not np.isfinite(weights).all():
            raise CheckpointError("a norm is no number", where=norm)
        root = math.sqrt(weights.size)
        values = (1.0, 1.0) if kv == "one" else (root * float(np.abs(weights).max()) / _LARGEST, root / _LARGEST)
        refs = cache_tensors(attention, layout)
        raw = b"".join(_number(value, ref.dtype) for value, ref in zip(values, refs, strict=True))
        out[norm] = Made(refs, _giving(raw))
    return out


def _giving(raw: bytes) -> Callable[[], Iterator[memoryview]]:
    return lambda: iter((memoryview(raw),))


def _number(value: float, dtype: str) -> bytes:
    """The least BF16 that is no smaller, in two bytes, or as a float32 in four: both layouts say the same."""
    high = (int(np.float32(value).view(np.uint32)) + 0xFFFF) >> 16
    return high.to_bytes(2, "little") if dtype == "BF16" else (high << 16).to_bytes(4, "little")
