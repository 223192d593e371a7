"""Why a mix is as it is: what every tensor weighs and costs, and the same by role and band of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.export.mix.shapes import quantisable
from gemcut.export.mix.sizes import role_of
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import GgmlType, tensor_bytes

BANDS = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """One tensor. layer: None outside of the blocks.   damage: nats of KLD, None where it was not measured."""

    name: str
    role: str
    layer: int | None
    kind: GgmlType
    size_bytes: int
    elements: int
    damage: float | None

    @property
    def bpw(self) -> float:
        return 8 * self.size_bytes / self.elements


@dataclass(frozen=True, slots=True)
class Band:
    """One role in a run of layers (first, last), both included; None outside of the blocks.

    types: most used first, with how many tensors have each.
    """

    role: str
    layers: tuple[int, int] | None
    types: tuple[tuple[GgmlType, int], ...]
    size_bytes: int
    elements: int
    damage: float

    @property
    def bpw(self) -> float:
        return 8 * self.size_bytes / self.elements


def choices(
    layout: GgufLayout, types: Mapping[str, GgmlType], damage: Mapping[tuple[str, GgmlType], float]
) -> tuple[Choice, ...]:
    """Every tensor that could be quantised, in the layout's order."""
    return tuple(
        Choice(
            tensor.name,
            role_of(tensor.name),
            tensor.layer,
            types[tensor.name],
            tensor_bytes(types[tensor.name], tensor.shape),
            tensor.weights,
            damage.get((tensor.name, types[tensor.name])),
        )
        for tensor in layout.tensors
        if quantisable(tensor)
    )


def bands(
    layout: GgufLayout,
    types: Mapping[str, GgmlType],
    damage: Mapping[tuple[str, GgmlType], float],
    *,
    count: int = BANDS,
) -> tuple[Band, ...]:
    """Roles by bands of about equally many layers, those that weigh most first."""
    width = -(-layout.layers // count)
    groups: dict[tuple[str, int], list[Choice]] = {}
    for one in choices(layout, types, damage):
        groups.setdefault((one.role, -1 if one.layer is None else one.layer // width), []).append(one)
    weights: Counter[str] = Counter()
    for (role, _), group in groups.items():
        weights[role] += sum(one.size_bytes for one in group)
    out = []
    for (role, band), group in sorted(groups.items(), key=lambda item: (-weights[item[0][0]], item[0])):
        used = Counter(one.kind for one in group)
        layers = None if band < 0 else (band * width, min((band + 1) * width, layout.layers) - 1)
        out.append(
            Band(
                role,
                layers,
                tuple(sorted(used.items(), key=lambda pair: (-pair[1], pair[0]))),
                sum(one.size_bytes for one in group),
                sum(one.elements for one in group),
                sum(one.damage or 0.0 for one in group),
            )
        )
    return tuple(out)
