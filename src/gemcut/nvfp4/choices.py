"""What may be chosen of an NVFP4 checkpoint, by name. Imports nothing, so that a recipe and --help can have it."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Scheme: TypeAlias = Literal["NVFP4", "NVFP4A16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
Targets: TypeAlias = Literal["mlp", "mlp+experts", "all"]
Method: TypeAlias = Literal["minmax", "four_over_six", "sweep", "weighted"]
METHODS: tuple[Method, ...] = get_args(Method)
ActivationRule: TypeAlias = Literal["max", "headroom"]
KvCache: TypeAlias = Literal["none", "one", "bound", "calibrated"]
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)
Layout: TypeAlias = Literal["compressed-tensors", "modelopt"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Narrow: TypeAlias = Literal["keep", "refuse"]
MAX_BORROWED = 0.2  # share of a layer's experts that may have their peers' scales before an export is refused


def wants_statistics(scheme: Scheme, scales: Method | None, kv: KvCache) -> bool:
    """Whether something of this can only be told from what was seen; `scales` None is the best that can be had."""
    return scheme == "NVFP4" or scales in (None, "weighted") or kv == "calibrated"
