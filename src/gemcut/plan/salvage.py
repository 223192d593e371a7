"""The largest set of layers whose cut still passes: ordered by damage, bisection, then single additions. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gemcut.types import Plan


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of layers that was tried."""

    layers: tuple[int, ...]  # ascending
    passed: bool


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What a search found. `layers` is the largest passing set that was tried; () where even one layer fails."""

    layers: tuple[int, ...]
    trials: tuple[Trial, ...]

    @property
    def restored(self) -> tuple[int, ...]:
        """Layers of the full set that go back to the base's bytes."""
        every = {layer for trial in self.trials for layer in trial.layers}
        return tuple(sorted(every - set(self.layers)))


def salvage(
    damage: Mapping[int, float], passes: Callable[[tuple[int, ...]], bool], *, whole_failed: bool = False
) -> Salvaged:
    """Search the largest set of layers that passes, in O(log L) trials for the prefix and at most L for the rest.

    Layers are ordered by damage, the least harmful first. Bisection finds a prefix of that order that passes while the
    next longer one that was tried fails; then every other layer, again in order of damage, is added if the set with it
    still passes. Passing need not be monotone: the result is a set that was tried and passed, not the best of all 2^L.

    Args:
        damage: layer → damage, larger is worse; ties go to the lower layer.
        whole_failed: it is known already that all layers together fail; they are not tried again.
        passes: called with ascending layers, never with an empty set, never twice with the same one.
    """
    order = sorted(damage, key=lambda layer: (damage[layer], layer))
    trials: dict[tuple[int, ...], bool] = {tuple(sorted(order)): False} if whole_failed and order else {}

    def tried(layers: list[int]) -> bool:
        key = tuple(sorted(layers))
        if key not in trials:
            trials[key] = passes(key)
        return trials[key]

    kept: list[int] = []
    if order and tried(order):
        kept = order
    else:
        low, high = 0, len(order)  # a prefix of `low` passes (nothing is the base itself), one of `high` fails
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tried(order[:middle]) else (low, middle)
        kept = order[:low]
        for layer in order[low:]:
            if tried([*kept, layer]):
                kept = [*kept, layer]
    return Salvaged(tuple(sorted(kept)), tuple(Trial(layers, passed) for layers, passed in trials.items()))


def keep_layers(plan: Plan, layers: tuple[int, ...]) -> Plan:
    """The plan for these layers only; what it dropped elsewhere stays as it is in the base."""
    return replace(plan, layers={layer: one for layer, one in plan.layers.items() if layer in layers})
