"""What a head cut may be where query heads share KV heads in runs: head h reads KV head h // group.

A layer of n query heads on k KV heads goes down to m query heads in one of two ways, and no query head changes its KV
head in either:

    thin     every KV head stays and serves m / k query heads       m divisible by k
    groups   m / group KV heads stay, each with all its query heads  m divisible by group = n / k

A model gives head i of m to KV head i // (m / k'). Where the KV heads lost different numbers of query heads, some
heads would then read the keys of another, without any error and with ruined text. `kept_kv_heads` refuses that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from gemcut.errors import UsageError
from gemcut.families.base import Attention
from gemcut.types import Plan

HeadMode: TypeAlias = Literal["mask", "structural"]
HEAD_MODES: tuple[HeadMode, ...] = ("mask", "structural")
#   mask        dropped heads are zeroed where they are read; shapes and config stay
#   structural  rows and columns of dropped heads leave, and the config's head counts with them


def mode_of(plan: Plan) -> HeadMode:
    """How a plan of heads is meant: `params["mode"]`, and mask where a plan by hand does not say.

    Raises:
        UsageError: no such mode.
    """
    mode = plan.params.get("mode", "mask")
    if mode not in HEAD_MODES:
        raise UsageError(
            "no such way to drop heads",
            where="params.mode of the plan",
            got=repr(mode)[:60],
            wanted=" or ".join(HEAD_MODES),
        )
    return mode


def kept_kv_heads(group: int, keep: Sequence[int], *, where: str) -> tuple[int, ...]:
    """The KV heads that stay when exactly the query heads `keep` (ascending) stay.

    Kept head number i will read kept KV head i // (heads kept / KV heads kept); that must be the one it read before.

    Raises:
        UsageError: it is another one, because the KV heads that stay serve different numbers of query heads; or no
            query head stays.
    """
    if not keep:
        raise UsageError("the plan keeps no query head", where=where)
    owners = [head // group for head in keep]
    kv = tuple(sorted(set(owners)))
    packed, odd = divmod(len(keep), len(kv))
    if odd or any(kv[i // packed] != owner for i, owner in enumerate(owners)):
        served = ", ".join(f"{owners.count(j)} of KV head {j}" for j in kv[:6])
        raise UsageError(
            "query heads would read another KV head after this cut",
            where=where,
            got=f"kept: {served}" + (" …" if len(kv) > 6 else ""),
            wanted="as many query heads on every KV head that stays",
            hint="plan heads again, or use mode mask, which moves no head",
        )
    return kv


def kv_heads_after(one: Attention, heads: int) -> int | None:
    """KV heads of the layer when `heads` query heads stay: all where they can be thinned evenly, else whole groups.

    None where neither way is open.
    """
    if not 0 < heads <= one.heads:
        return None
    if heads % one.kv_heads == 0:
        return one.kv_heads
    return heads // one.group if heads % one.group == 0 else None


def legal_head_counts(shapes: Mapping[int, Attention]) -> tuple[int, ...]:
    """Numbers of query heads that a structural cut may leave in every one of these layers, ascending."""
    most = min(one.heads for one in shapes.values())
    return tuple(m for m in range(1, most + 1) if all(kv_heads_after(one, m) is not None for one in shapes.values()))
