"""What a GGUF file of a checkpoint holds: facts that a family states and the exporter follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, TypeAlias

from gemcut.types import F32

# How a value of the metadata is stored. Arrays are ("i32", [..]) and so on, with the type of their members.
ScalarKind: TypeAlias = Literal["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "bool", "str"]


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value: a scalar, or an array where `value` is a tuple."""

    kind: ScalarKind
    value: int | float | bool | str | tuple[int, ...] | tuple[float, ...] | tuple[bool, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grown:
    """Zeros that the file holds and the checkpoint does not: behind every run of `rows[0]` rows up to `rows[1]`, and
    behind the `columns[0]` columns of every row up to `columns[1]`."""

    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One tensor of a GGUF file.

    name: as GGUF says it, `blk.3.attn_q.weight`.   layer: 3; None outside of blocks.   role: `attn_q`.
    shape: rows first, as safetensors has it ([E, 2I, H]); the file stores it reversed.
    source: the tensor on disk that fills it, or None where `values` does.
    values: float32, made by the family (rope_freqs).
    permute: axes of the source to put in this order before the shape is taken (patch embeddings); () for as it is.
    keep_f32: stored as float32 whatever the type of the file (norms, scales, the router).
    grown: zeros that `shape` has and the source has not.
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
    grown: Grown | None = None

    @property
    def weights(self) -> int:
        """Elements without the zeros of `grown`."""
        found = prod(self.shape)
        if self.grown is None:
            return found
        (few_rows, rows), (few_columns, columns) = self.grown.rows, self.grown.columns
        return found // (rows * columns) * (few_rows * few_columns)


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


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`general.size_label` of a file with these tensors: `8.3M`, or for experts `32x3.4M` (experts × what one token's
    shared part and one expert weigh)."""
    shared, one_expert, counts = 0, 0, []
    for name, shape in shapes.items():
        if "_exps." in name and len(shape) >= 3:
            counts.append(shape[0])
            one_expert += prod(shape[1:])
        else:
            shared += prod(shape)
    if not counts:
        return _rounded(shared)
    return f"{sum(counts) // len(counts)}x{_rounded(shared + one_expert)}"


def _rounded(count: int) -> str:
    scale, letter = next(((s, c) for s, c in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M")) if count * s > 1), (1e-3, "K"))
    scaled = count * scale
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{letter}"
