"""The types that do the least damage in a file of a given size.

Every tensor takes one of its types; damages add up; sizes are exact. First the upgrades that buy most per byte, in
that order, as far as the budget goes (optimal for every budget that they happen to fill); then what is left over is
spent by exchanging single types, down here and up there, until no exchange helps.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemcut.errors import UsageError
from gemcut.export.mix.padding import would_pad
from gemcut.export.mix.shapes import quantisable, unquantised_type
from gemcut.export.mix.sizes import stored_bytes
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.quantise import requires_imatrix
from gemcut.ggml.types import GgmlType

_EXCHANGES = 10_000  # more were never needed: a few hundred settle a model of 800 tensors


@dataclass(frozen=True, slots=True)
class Option:
    kind: GgmlType
    size_bytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class Solution:
    """size_bytes: of the whole file.   least_bytes, most_bytes: of the files that these types allow.

    price: damage that one byte more would have saved, at the margin; 0 where everything has its best type.
    """

    types: Mapping[str, GgmlType]
    size_bytes: int
    budget_bytes: int
    damage: float
    price: float
    least_bytes: int
    most_bytes: int


def solve(
    layout: GgufLayout,
    damage: Mapping[tuple[str, GgmlType], float],
    budget_bytes: int,
    *,
    header_bytes: int = 0,
    fixed: Mapping[str, GgmlType] | None = None,
    unquantised: GgmlType = GgmlType.BF16,
) -> Solution:
    """Minimise Σ_t damage[t, type of t] with the file at most `budget_bytes` large.

    Args:
        damage: of every tensor in every type that it may have, at least 0, in one unit (nats of KLD). Tensors that are
            never quantised need none.
        header_bytes: what stands before the first tensor's data.
        fixed: tensors whose type is decided, by hand for example.
    Raises:
        UsageError: the least possible file is larger than the budget (says how large), a tensor has no types to choose
            from, or a damage is no number.
    """
    fixed = dict(fixed or {})
    base = header_bytes
    types: dict[str, GgmlType] = {}
    choices: dict[str, list[Option]] = {}
    offered: dict[str, list[Option]] = {}
    sizes = {tensor.name: tensor for tensor in layout.tensors}
    for (name, kind), value in damage.items():
        if name in sizes and not (value >= 0 and value < float("inf")):
            raise UsageError("a damage is no number", where=f"{name} as {kind.name}", got=value)
        if name in sizes:
            offered.setdefault(name, []).append(Option(kind, stored_bytes(kind, sizes[name]), float(value)))
    for tensor in layout.tensors:
        if tensor.name in fixed or not quantisable(tensor):
            types[tensor.name] = fixed.get(tensor.name, unquantised_type(tensor, unquantised))
            base += stored_bytes(types[tensor.name], tensor)
        elif tensor.name in offered:
            choices[tensor.name] = _useful(offered[tensor.name])
        else:
            raise UsageError("nothing is known of a tensor's damage in any type", where=tensor.name)
    least = base + sum(options[0].size_bytes for options in choices.values())
    most = base + sum(options[-1].size_bytes for options in choices.values())
    refuse_small(layout, budget_bytes, least, importances=any(requires_imatrix(kind) for _, kind in damage))
    taken, price = _by_price(choices, budget_bytes - base)
    _exchange(choices, taken, budget_bytes - base)
    types |= {name: choices[name][at].kind for name, at in taken.items()}
    return Solution(
        types={tensor.name: types[tensor.name] for tensor in layout.tensors},
        size_bytes=base + sum(choices[name][at].size_bytes for name, at in taken.items()),
        budget_bytes=budget_bytes,
        damage=sum(choices[name][at].damage for name, at in taken.items()),
        price=price,
        least_bytes=least,
        most_bytes=most,
    )


def refuse_small(
    layout: GgufLayout, budget_bytes: int, least_bytes: int, *, importances: bool, where: str | None = None
) -> None:
    """Hold a budget against the smallest file.

    Args:
        importances: there is an importance matrix, so that the smallest types are among those that count.
    Raises:
        UsageError: the budget is smaller.
    """
    if budget_bytes >= least_bytes:
        return
    ways = ["a larger size"]
    if not importances:
        ways.append("an importance matrix (smaller types need one)")
    if would_pad(layout):
        ways.append("padded experts (they take smaller types)")
    raise UsageError(
        "no mix of these types is so small",
        where=where,
        got=f"a budget of {budget_bytes} bytes",
        wanted=f"at least {least_bytes} bytes ({least_bytes / 2**20:,.1f} MiB)",
        hint=f"{', '.join(ways)} or a smaller model",
    )


def _useful(options: Iterable[Option]) -> list[Option]:
    """Those with less damage than every smaller one, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.size_bytes, one.damage, one.kind)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def _hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull: each step up saves less per byte than the one before."""
    hull: list[int] = []
    for i in range(len(options)):
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _rate(options: Sequence[Option], low: int, high: int) -> float:
    """Damage saved per byte."""
    return (options[low].damage - options[high].damage) / (options[high].size_bytes - options[low].size_bytes)


def _by_price(choices: Mapping[str, Sequence[Option]], room: int) -> tuple[dict[str, int], float]:
    """Start with the smallest types; take the best upgrades along the hulls while they fit. Returns the next price."""
    taken = dict.fromkeys(choices, 0)
    used = sum(options[0].size_bytes for options in choices.values())
    hulls = {name: _hull(options) for name, options in choices.items()}
    queue = [(-_rate(choices[name], hull[0], hull[1]), name, 0) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    price = 0.0
    while queue:
        rate, name, step = heapq.heappop(queue)
        options, hull = choices[name], hulls[name]
        cost = options[hull[step + 1]].size_bytes - options[hull[step]].size_bytes
        if used + cost > room:
            price = max(price, -rate)
            continue  # others may still fit; this tensor waits for the exchange
        used += cost
        taken[name] = hull[step + 1]
        if step + 2 < len(hull):
            heapq.heappush(queue, (-_rate(options, hull[step + 1], hull[step + 2]), name, step + 1))
    return taken, price


@dataclass(frozen=True, slots=True, order=True)
class _Move:
    """Another type for one tensor. cost: bytes more (or less).   gain: damage saved (or done)."""

    cost: int
    gain: float
    name: str
    to: int


def _exchange(choices: Mapping[str, Sequence[Option]], taken: dict[str, int], room: int) -> None:
    """Change `taken`: one type up, or one down and another up, as long as damage falls and everything fits."""
    used = sum(choices[name][at].size_bytes for name, at in taken.items())
    for _ in range(_EXCHANGES):
        moves = [
            _Move(option.size_bytes - now.size_bytes, now.damage - option.damage, name, i)
            for name, options in choices.items()
            for now in (options[taken[name]],)
            for i, option in enumerate(options)
            if i != taken[name]
        ]
        ups = sorted(move for move in moves if move.gain > 0)
        best = _best_pair([_Move(0, 0.0, "", 0), *(move for move in moves if move.cost < 0)], ups, room - used)
        if best is None:
            return
        for move in best:
            taken[move.name] = move.to
            used += move.cost


def _best_pair(downs: Sequence[_Move], ups: Sequence[_Move], slack: int) -> list[_Move] | None:
    """The move down (or none) and the move up of another tensor that together save most and fit."""
    costs = [move.cost for move in ups]
    first: list[_Move] = []  # best up among those not dearer …
    second: list[_Move | None] = []  # … and the best of another tensor than that one's
    for move in ups:
        one = first[-1] if first else move
        two = second[-1] if second else None
        if move.gain > one.gain:
            one, two = move, (one if one.name != move.name else two)
        elif move.name != one.name and (two is None or move.gain > two.gain):
            two = move
        first.append(one)
        second.append(two)
    best: tuple[float, list[_Move]] | None = None
    for down in downs:
        at = bisect.bisect_right(costs, slack - down.cost) - 1
        if at < 0:
            continue
        up = first[at] if first[at].name != down.name else second[at]
        if up is None:
            continue
        gain = up.gain + down.gain
        if gain > 1e-12 * abs(up.gain) and (best is None or gain > best[0]):
            best = (gain, [move for move in (down, up) if move.name])
    return None if best is None else best[1]
