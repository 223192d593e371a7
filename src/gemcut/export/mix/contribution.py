"""ContribDynamic tiers: the feed-forward tensors of layers that contribute more get more bits.

A tier is three types for the feed-forward of the top, the middle and the low layers, and one for all of attention;
token embeddings and output are Q8_0. The shares of the layers are those of the published 30-layer maps (1, 7 and 22),
as fractions, so that every number of layers has its map. The published IQ3 and IQ2 tiers named file types where tensor
types belong and never worked; the ones here are ours, as is CD-Q3_K_M, whose map was not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.errors import UsageError
from gemcut.export.mix.shapes import quantisable, shaped
from gemcut.export.mix.stock import stock_types
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import GgmlType as T
from gemcut.types import F64

TOP, MIDDLE = 1 / 30, 7 / 30  # shares of the layers; the rest is low
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")  # … and the fused experts, whose names begin so
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv")
_PLACE = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Tier:
    """plain: the file type whose name this tier has, and that it must differ from."""

    plain: str
    top: T
    middle: T
    low: T
    attention: T


TIERS: Mapping[str, Tier] = {
    "CD-Q6_K": Tier("Q6_K", T.Q8_0, T.Q6_K, T.Q5_K, T.Q8_0),
    "CD-Q5_K_M": Tier("Q5_K_M", T.Q6_K, T.Q5_K, T.Q4_K, T.Q6_K),
    "CD-Q4_K_M": Tier("Q4_K_M", T.Q5_K, T.Q4_K, T.Q3_K, T.Q5_K),
    "CD-Q3_K_L": Tier("Q3_K_L", T.Q4_K, T.Q3_K, T.Q3_K, T.Q5_K),
    "CD-Q3_K_M": Tier("Q3_K_M", T.Q4_K, T.Q3_K, T.Q2_K, T.Q5_K),
    "CD-Q2_K": Tier("Q2_K", T.Q3_K, T.Q2_K, T.Q2_K, T.Q4_K),
    "CD-IQ4_K_M": Tier("IQ4_XS", T.IQ4_NL, T.IQ4_XS, T.Q3_K, T.Q5_K),
    "CD-IQ3_K_M": Tier("IQ3_M", T.IQ4_XS, T.IQ3_S, T.IQ3_XXS, T.Q5_K),
    "CD-IQ2_K": Tier("IQ2_M", T.IQ3_S, T.IQ2_S, T.IQ2_XS, T.Q4_K),
}


def tier(name: str) -> Tier:
    """A tier by its name, in any case.

    Raises:
        UsageError: no tier has this name.
    """
    try:
        return TIERS[name.strip().upper()]
    except KeyError:
        raise UsageError("no such ContribDynamic tier", got=name, wanted=f"one of {', '.join(TIERS)}") from None


def tier_types(name: str, layout: GgufLayout, contribution: Sequence[float] | F64) -> dict[str, T]:
    """Tensor name → type, in the layout's order.

    Args:
        contribution: one number per layer, larger for layers that deserve more bits; only their order is used, and of
            equal ones the earlier layer comes first.
    Raises:
        UsageError: no such tier; not one finite number per layer, or the same for all; or the file would have the very
            types of the plain file type.
    """
    chosen = tier(name)
    bands = bands_of(layout, contribution)
    types = stock_types(chosen.plain, layout, imatrix=True)
    plain = dict(types)
    for tensor in layout.tensors:
        if not quantisable(tensor):
            continue
        place = _PLACE.fullmatch(tensor.name)
        if place is None:
            types[tensor.name] = shaped(T.Q8_0, tensor)
        elif place[2].startswith(FEED_FORWARD):
            types[tensor.name] = shaped((chosen.top, chosen.middle, chosen.low)[bands[int(place[1])]], tensor)
        elif place[2] in ATTENTION:
            types[tensor.name] = shaped(chosen.attention, tensor)
    if all(types[key] == kind for key, kind in plain.items() if _PLACE.fullmatch(key)):
        raise UsageError(
            f"{name} would be {chosen.plain} under another name",
            hint="the model's rows leave no choice of types here: take the plain file type",
        )
    return types


def layers_alike(layout: GgufLayout) -> bool:
    """Whether a tier weighs the same whichever layers its bands take."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for tensor in layout.tensors:
        place = _PLACE.fullmatch(tensor.name)
        if place is not None and place[2].startswith(FEED_FORWARD):
            shapes.setdefault(place[2], set()).add(tensor.shape)
    return all(len(found) == 1 for found in shapes.values())


def bands_of(layout: GgufLayout, contribution: Sequence[float] | F64) -> tuple[int, ...]:
    """The band of each layer: 0 top, 1 middle, 2 low. The top band is never empty.

    Raises:
        UsageError: not one finite number per layer, or the same for all.
    """
    values, n = np.asarray(contribution, dtype=np.float64), layout.layers
    if values.shape != (n,) or not np.isfinite(values).all():
        raise UsageError("a contribution is a finite number for every layer", got=list(values.shape), wanted=f"[{n}]")
    if n > 1 and np.ptp(values) == 0:
        raise UsageError("all layers contribute the same", hint="the statistics tell no layer from another")
    top = max(1, round(TOP * n))
    middle = max(top, round((TOP + MIDDLE) * n))
    bands = np.full(n, 2)
    order = np.argsort(-values, kind="stable")
    bands[order[:middle]] = 1
    bands[order[:top]] = 0
    return tuple(int(band) for band in bands)


def contribution_of(layout: GgufLayout, energies: Mapping[str, float]) -> F64:
    """Contribution of each layer from the energy that enters its linears, float64 [L].

        e[t, l] = Σ_columns E[a²] of role t in layer l                     (a sum of the imatrix over its count)
        c[l]    = exp( mean_t ( ln e[t, l] − a_t − b_t·l ) ),  a_t, b_t: least squares over the layers that have t

    The fit takes out what a role's scale and the growth of activations with depth put into the published sum Σ_t e,
    which ranks late layers first whatever they do: multiplying one role by a constant, or by a power of the depth's
    exponential, changes nothing.

    Args:
        energies: tensor name → Σ_columns E[a²], for experts over all tokens of all experts. Tensors without one, or
            with none above 0, are left out.
    Raises:
        UsageError: a layer has no energy at all.
    Source:
        after the published maps' Σ_t Σ in_sum2 / Σ counts; the detrending is ours.
    """
    roles: dict[str, dict[int, float]] = {}
    for tensor in layout.tensors:
        place = _PLACE.fullmatch(tensor.name)
        energy = energies.get(tensor.name, 0.0)
        if place is not None and quantisable(tensor) and np.isfinite(energy) and energy > 0:
            roles.setdefault(place[2], {})[int(place[1])] = float(np.log(energy))
    residual: list[list[float]] = [[] for _ in range(layout.layers)]
    for found in roles.values():
        at, values = np.array(sorted(found), dtype=np.float64), np.array([found[i] for i in sorted(found)])
        fit = np.polyval(np.polyfit(at, values, 1), at) if len(at) > 2 else np.full(len(at), values.mean())
        for layer, rest in zip(sorted(found), values - fit, strict=True):
            residual[layer].append(float(rest))
    if empty := [i for i, rest in enumerate(residual) if not rest]:
        raise UsageError("no statistics of a layer", where=f"layer {empty[0]}", hint="observe the whole model")
    return np.array([np.exp(np.mean(rest)) for rest in residual], dtype=np.float64)
