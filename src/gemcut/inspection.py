"""What a checkpoint is, what it weighs by component, and what can be cut: from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.checkpoint.read import Checkpoint
from gemcut.families.base import COMPONENTS
from gemcut.nvfp4.describe import Quantised, describe, weights_by_tensor
from gemcut.types import Kind


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the model."""

    name: str
    tensors: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Cuttable:
    """One kind of unit, over all layers that have it."""

    kind: Kind
    layers: tuple[int, ...]
    units: int  # per layer
    minimum: int  # a plan cannot keep fewer
    size_bytes_per_unit: int  # one unit of every layer together
    parameters_per_unit: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `gemcut inspect` shows. No path: the name is the hub id or the folder's own name."""

    name: str
    family: str
    architecture: str
    layers: int
    shards: int
    tensors: int
    parameters: int
    size_bytes: int
    bytes_by_dtype: Mapping[str, int]
    tied_head: bool
    experts_per_token: int  # 0 for a dense decoder
    components: tuple[Component, ...]  # in the order of families.base.COMPONENTS, empty ones left out
    cuttable: tuple[Cuttable, ...]  # nothing of a quantised one: cut what it was made from
    quantised: Quantised | None  # None: plain weights


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Count parameters and bytes; no tensor byte is read. The scales of quantised weights are no parameters."""
    family, quantised, weights = checkpoint.family, describe(checkpoint), weights_by_tensor(checkpoint)
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in COMPONENTS}
    dtypes: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        row = counts[family.component(ref.name)]
        row[0] += 1
        row[1] += weights[ref.name]
        row[2] += ref.size_bytes
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.size_bytes
    architectures = checkpoint.config.get("architectures")
    return Inspection(
        name=checkpoint.name,
        family=family.name,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        layers=_layers(checkpoint) if quantised else len({site.layer for site in checkpoint.sites}),
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.tensors),
        parameters=sum(row[1] for row in counts.values()),
        size_bytes=checkpoint.size_bytes,
        bytes_by_dtype=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        tied_head=checkpoint.tied,
        experts_per_token=family.top_k(checkpoint.text_config),
        components=tuple(Component(name, *row) for name, row in counts.items() if row[0]),
        cuttable=() if quantised else _cuttable(checkpoint),
        quantised=quantised,
    )


def _layers(checkpoint: Checkpoint) -> int:
    """Of a quantised checkpoint, some of whose layers cannot be cut any more."""
    said = checkpoint.text_config.get("num_hidden_layers")
    return said if isinstance(said, int) else 0


def _cuttable(checkpoint: Checkpoint) -> tuple[Cuttable, ...]:
    out: list[Cuttable] = []
    kinds: tuple[Kind, ...] = ("experts", "heads")
    for kind in kinds:
        sites = [site for site in checkpoint.sites if site.kind == kind]
        if not sites:
            continue
        size_bytes = parameters = 0
        for site in sites:
            for cut in site.slices:
                ref = checkpoint.ref(cut.name)
                size_bytes += ref.size_bytes // site.units
                parameters += ref.elements // site.units
        minimum = checkpoint.family.top_k(checkpoint.text_config) if kind == "experts" else 1
        layers = tuple(site.layer for site in sites)
        out.append(Cuttable(kind, layers, sites[0].units, minimum, size_bytes, parameters))
    return tuple(out)
