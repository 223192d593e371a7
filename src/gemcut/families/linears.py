"""What quantised checkpoints call a decoder's weight matrices, and which of them servers fuse into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gemcut.types import Json

LinearPart: TypeAlias = Literal["mlp", "experts", "attention"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix [R, F]: rows `first … stop` of a stored tensor, all of whose leading axes count as rows.

    module: the path of the linear that a quantised checkpoint has for it, `….mlp.gate_proj`, `….experts.3.up_proj`.
    """

    module: str
    tensor: str
    first: int
    stop: int
    columns: int

    @property
    def rows(self) -> int:
        """R."""
        return self.stop - self.first


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Matrices of one layer that read the same input and that servers fuse: they share their global scales.

    input: whose input statistics they have, below the layer (`mlp.gate_proj`, `experts.gate_up_proj`).
    unit: the expert, 0 for a linear that every token enters.
    """

    layer: int
    part: LinearPart
    input: str
    unit: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class Linears:
    """Facts of one architecture.

    groups(text_config, shapes): every matrix of the decoder layers, in the order of layers and experts.
    stored(linears): the tensors that linears come out of, name → shape, from module → [R, F]. CheckpointError where an
        expert is missing, or is unlike its peers.
    fused: name of a fused module → the names that it is made of; those that a layer lacks count as well.
    served: how a path of the checkpoint begins → how vLLM's begins.
    experts_at: what vLLM's path has before `experts.E.`, and the checkpoint has not.
    """

    groups: Callable[[Mapping[str, Json], Mapping[str, tuple[int, ...]]], tuple[LinearGroup, ...]]
    stored: Callable[[Mapping[str, tuple[int, int]]], dict[str, tuple[int, ...]]]
    fused: Mapping[str, tuple[str, ...]]
    served: tuple[tuple[str, str], ...]
    experts_at: str
