"""The weights behind a GGUF tensor, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError
from gemcut.families.gguf import GgufTensor
from gemcut.types import DTYPE_BYTES, F32, F64, TensorRef

_PIECE_VALUES = 1 << 22


def rows_of(checkpoint: Checkpoint, tensor: GgufTensor, unit: int, start: int, stop: int) -> F32:
    """float32 [stop − start, F]: rows of one unit (0 where the tensor has no axis of units)."""
    ref = _source(checkpoint, tensor)
    rows, columns = ref.shape[-2:]
    first, width = unit * rows + start, columns * DTYPE_BYTES[ref.dtype]
    raw = checkpoint.read_range(ref.name, first * width, (first + stop - start) * width)
    values = decode(ref.dtype, raw)
    if values is None:
        raise CheckpointError("weights of this type cannot be read", where=ref.name, got=ref.dtype)
    return values.astype(np.float32).reshape(stop - start, columns)


def units_of(tensor: GgufTensor) -> int:
    """U: experts of a fused tensor, else 1."""
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def column_energy(checkpoint: Checkpoint, tensor: GgufTensor) -> F64:
    """w [U, F], w[u, c] = Σ_r W[u, r, c]², float64 sums of float32 squares."""
    units, (rows, columns) = units_of(tensor), tensor.shape[-2:]
    out = np.zeros((units, columns))
    for unit in range(units):
        for start, stop in _pieces(rows, columns):
            piece = rows_of(checkpoint, tensor, unit, start, stop)
            out[unit] += np.einsum("rc,rc->c", piece, piece, dtype=np.float64)
    return out


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE_VALUES // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _source(checkpoint: Checkpoint, tensor: GgufTensor) -> TensorRef:
    """The tensor on disk, in the shape that the layout says: linears are stored as they are."""
    assert tensor.source is not None
    ref = checkpoint.ref(tensor.source)
    if tensor.permute or ref.shape != tensor.shape:
        raise CheckpointError(
            "the weights have another shape than the layout says",
            where=tensor.source,
            got=list(ref.shape),
            wanted=list(tensor.shape),
        )
    return ref
