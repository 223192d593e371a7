"""The types a GGUF tensor can have, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import prod
from typing import NamedTuple

from gemcut.errors import UsageError


class GgmlType(IntEnum):
    """Numbers as they stand in a GGUF file. Types that llama.cpp removed, or never stores, are not here."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


class Block(NamedTuple):
    """values: columns of a row that are stored together.   size_bytes: what they take."""

    values: int
    size_bytes: int


BLOCKS: dict[GgmlType, Block] = {
    GgmlType.F32: Block(1, 4),
    GgmlType.F16: Block(1, 2),
    GgmlType.Q4_0: Block(32, 18),
    GgmlType.Q4_1: Block(32, 20),
    GgmlType.Q5_0: Block(32, 22),
    GgmlType.Q5_1: Block(32, 24),
    GgmlType.Q8_0: Block(32, 34),
    GgmlType.Q2_K: Block(256, 84),
    GgmlType.Q3_K: Block(256, 110),
    GgmlType.Q4_K: Block(256, 144),
    GgmlType.Q5_K: Block(256, 176),
    GgmlType.Q6_K: Block(256, 210),
    GgmlType.IQ2_XXS: Block(256, 66),
    GgmlType.IQ2_XS: Block(256, 74),
    GgmlType.IQ3_XXS: Block(256, 98),
    GgmlType.IQ1_S: Block(256, 50),
    GgmlType.IQ4_NL: Block(32, 18),
    GgmlType.IQ3_S: Block(256, 110),
    GgmlType.IQ2_S: Block(256, 82),
    GgmlType.IQ4_XS: Block(256, 136),
    GgmlType.I8: Block(1, 1),
    GgmlType.I16: Block(1, 2),
    GgmlType.I32: Block(1, 4),
    GgmlType.I64: Block(1, 8),
    GgmlType.F64: Block(1, 8),
    GgmlType.IQ1_M: Block(256, 56),
    GgmlType.BF16: Block(1, 2),
    GgmlType.TQ1_0: Block(256, 54),
    GgmlType.TQ2_0: Block(256, 66),
    GgmlType.MXFP4: Block(32, 17),
    GgmlType.NVFP4: Block(64, 36),
    GgmlType.Q1_0: Block(128, 18),
    GgmlType.Q2_0: Block(64, 18),
}

# Quantisers that refuse to run without importances, whatever the tensor.
NEED_IMATRIX = frozenset({GgmlType.IQ1_S, GgmlType.IQ2_XXS, GgmlType.IQ2_XS})


def parse_type(text: str) -> GgmlType:
    """A type by its name, in any case. File types (IQ3_M, Q4_K_M) are not tensor types.

    Raises:
        UsageError: no tensor type has this name.
    """
    try:
        return GgmlType[text.strip().upper()]
    except KeyError:
        names = ", ".join(one.name for one in GgmlType)
        raise UsageError("no such tensor type", got=text, wanted=f"one of {names}") from None


def fits(kind: GgmlType, columns: int) -> bool:
    """Whether rows of so many columns can be stored in this type."""
    return columns > 0 and columns % BLOCKS[kind].values == 0


def tensor_bytes(kind: GgmlType, shape: Sequence[int]) -> int:
    """Bytes of a tensor [..., rows, columns] in this type.

    Raises:
        UsageError: the columns are not a multiple of the type's block.
    """
    block = BLOCKS[kind]
    columns = shape[-1] if shape else 1
    if columns % block.values:
        raise UsageError(
            f"rows cannot be stored as {kind.name}", got=f"{columns} columns", wanted=f"a multiple of {block.values}"
        )
    return prod(shape) // block.values * block.size_bytes
