"""What a GGUF file of a checkpoint holds: facts that a family states and the exporter follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from gemcut.types import F32

# How a value of the metadata is stored. Arrays are ("i32", [..]) and so on, with the type of their members.
ScalarKind: TypeAlias = Literal["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "bool", "str"]


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value: a scalar, or an array where `value` is a tuple."""

    kind: ScalarKind
    value: int | float | bool | str | tuple[int, ...] | tuple[float, ...] | tuple[bool, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One tensor of a GGUF file.

    name: as GGUF says it, `blk.3.attn_q.weight`.   layer: 3; None outside of blocks.   role: `attn_q`.
    shape: rows first, as safetensors has it ([E, 2I, H]); the file stores it reversed.
    source: the tensor on disk that fills it, or None where `values` does.
    values: float32, made by the family (rope_freqs).
    permute: axes of the source to put in this order before the shape is taken (patch embeddings); () for as it is.
    keep_f32: stored as float32 whatever the type of the file (norms, scales, the router).
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    layer: int | None = None
    role: str = ""
    values: F32 | None = None
    source_shape: tuple[int, ...] = ()
    permute: tuple[int, ...] = ()
    keep_f32: bool = False


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """A whole file, before any type is chosen: order of keys and tensors is the order in the file.

    metadata: the architecture's own keys, and `general.file_type` at its place, to be overwritten. What stands before
        (names, licence, sampling) and behind (tokenizer, provenance) comes from the exporter.
    facts for the stock mixes: layers, experts (0: dense), group = query heads per KV head in layer 0, tied output.
    left_out: tensors of the checkpoint that this file does not hold → why.
    """

    architecture: str
    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]
    layers: int
    experts: int
    group: int
    tied: bool
    left_out: Mapping[str, str] = field(default_factory=dict)
