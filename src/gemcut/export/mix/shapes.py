"""What a tensor's name and shape allow: whether it is quantised at all, and what stands in where blocks do not fit."""

from __future__ import annotations

from gemcut.errors import UsageError
from gemcut.export.mix.tables import FALLBACK, UNTOUCHED, UNTOUCHED_NAMES
from gemcut.families.gguf import GgufTensor
from gemcut.ggml.types import BLOCKS, GgmlType, fits


def quantisable(tensor: GgufTensor) -> bool:
    """Whether a quantised type may be chosen for this tensor at all: matrices that end in `weight`, but for norms,
    the router and a few small tables."""
    name = tensor.name
    dimensions = len(tensor.shape) - next((i for i, n in enumerate(tensor.shape) if n != 1), len(tensor.shape))
    if tensor.keep_f32 or dimensions < 2 or not name.endswith("weight"):
        return False
    return name not in UNTOUCHED_NAMES and not any(part in name for part in UNTOUCHED)


def unquantised_type(tensor: GgufTensor, wide: GgmlType = GgmlType.BF16) -> GgmlType:
    """The type of a tensor that is never quantised: float32 for vectors and what the family says, else `wide`."""
    return GgmlType.F32 if tensor.keep_f32 or len(tensor.shape) < 2 else wide


def shaped(kind: GgmlType, tensor: GgufTensor) -> GgmlType:
    """The type itself where its blocks divide the tensor's rows; else the smaller-blocked type that replaces it.

    Raises:
        UsageError: no type is defined to replace it.
    """
    columns = tensor.shape[-1]
    if fits(kind, columns):
        return kind
    other = FALLBACK.get(kind)
    if other is None and BLOCKS[kind].values > 32:
        raise UsageError(
            f"rows cannot be stored as {kind.name}, and no type stands in for it",
            where=tensor.name,
            got=f"{columns} columns",
            wanted=f"a multiple of {BLOCKS[kind].values}",
        )
    return other if other is not None and fits(other, columns) else GgmlType.F16
