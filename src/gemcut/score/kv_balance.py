"""Which sets of query heads may go together: query heads hang on key-value heads, group by group."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gemcut.errors import UsageError
from gemcut.types import F64

Rule: TypeAlias = Literal["spread", "equal", "groups"]


@dataclass(frozen=True, slots=True)
class Balance:
    """Which sets of query heads may go: head h reads KV group h // group.

    spread: at most ceil(count / kv_heads) heads of a group; for masks, where no KV head disappears.
    equal: the same number of every group; what a structural cut needs where every KV head stays.
    groups: whole groups; what a structural cut needs where KV heads go too.
    """

    kv_heads: int
    group: int
    rule: Rule

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """What goes in one piece, ascending: a head, or all heads of a group."""
        size = self.group if self.rule == "groups" else 1
        return tuple(tuple(range(h, h + size)) for h in range(0, self.heads, size))

    def legal(self, count: int) -> bool:
        """Whether so many heads can go; at least one head stays."""
        step = {"spread": 1, "equal": self.kv_heads, "groups": self.group}[self.rule]
        return 0 <= count < self.heads and count % step == 0

    def require(self, count: int, where: str | None = None) -> None:
        """Refuse a count that no set can have.

        Raises:
            UsageError: names the legal counts on both sides.
        """
        if self.legal(count):
            return
        counts = [n for n in range(self.heads) if self.legal(n)]
        near = [*[n for n in counts if n < count][-2:], *[n for n in counts if n > count][:2]]
        what = {
            "spread": "so many heads cannot be removed",
            "equal": f"the removed heads do not divide among {self.kv_heads} KV groups",
            "groups": f"the removed heads are no whole KV groups of {self.group}",
        }
        raise UsageError(
            what[self.rule],
            where=where,
            got=f"{count} of {self.heads} heads",
            wanted=" or ".join(map(str, near)),
        )

    def may_add(self, chosen: Collection[int], head: int, count: int) -> bool:
        """Whether `head` may join `chosen` on the way to `count` heads."""
        if head in chosen or not 0 <= head < self.heads or len(chosen) >= count:
            return False
        inside = sum(h // self.group == head // self.group for h in chosen)
        if self.rule == "spread":
            return inside < -(-count // self.kv_heads)
        if self.rule == "equal":
            return inside < count // self.kv_heads
        return inside > 0 or len(chosen) % self.group == 0  # a group that was begun is finished first

    def fits(self, chosen: Iterable[int], unit: Iterable[int], count: int) -> bool:
        """Whether a whole unit may join."""
        grown = set(chosen)
        for head in unit:
            if not self.may_add(grown, head, count):
                return False
            grown.add(head)
        return True


def lowest(values: F64, count: int, balance: Balance) -> tuple[int, ...]:
    """The `count` heads of the lowest values [U] that the balance allows, ascending; ties to the lower number.

    Units of several heads are ranked by their sum. Taking them in order never gets stuck: the rules cap each group.
    """
    units = balance.units
    sums = [float(sum(values[h] for h in unit)) for unit in units]
    out: list[int] = []
    for unit in sorted(range(len(units)), key=lambda j: (sums[j], j)):
        if balance.fits(out, units[unit], count):
            out.extend(units[unit])
    return tuple(sorted(out))
