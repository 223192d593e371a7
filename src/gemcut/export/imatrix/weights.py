"""The weights behind a GGUF tensor, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.export.source import Buffers, Piece, Source
from gemcut.families.gguf import GgufTensor
from gemcut.types import F32, F64

_PIECE_VALUES = 1 << 20
_RUN = 8  # rows read together where only some are wanted


def units_of(tensor: GgufTensor) -> int:
    """U: experts of a fused tensor, else 1."""
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def column_energy(checkpoint: Checkpoint, tensor: GgufTensor) -> F64:
    """w [U, F], w[u, c] = Σ_r W[u, r, c]², float64 sums of float32 squares over pieces of rows."""
    source = Source(checkpoint, tensor, Buffers())
    units, (rows, columns) = units_of(tensor), tensor.shape[-2:]
    out = np.zeros((units, columns))
    for unit in range(units):
        for start, stop in _pieces(rows, columns):
            values = source.load(Piece(unit * rows + start, unit * rows + stop)).values
            out[unit] += np.einsum("rc,rc->c", values, values)
    return out


def some_rows(checkpoint: Checkpoint, tensor: GgufTensor, most: int) -> Iterator[F32]:
    """Of every unit, float32 [R, F]: runs of 8 rows, evenly spread, at most about `most` rows of the whole tensor."""
    source = Source(checkpoint, tensor, Buffers())
    units, rows = units_of(tensor), tensor.shape[-2]
    runs = -(-rows // _RUN)
    wanted = min(runs, max(1, most // units // _RUN))
    starts = np.unique(np.linspace(0, runs - 1, wanted).round().astype(int)) * _RUN
    for unit in range(units):
        at = unit * rows
        pieces = [Piece(at + int(start), at + min(int(start) + _RUN, rows)) for start in starts]
        yield np.concatenate([source.load(piece).values.copy() for piece in pieces])  # a load reuses its room


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE_VALUES // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
