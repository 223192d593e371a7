"""What changed inside a tensor of unchanged shape: relative change, zeroed positions. numpy only, bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemcut.checkpoint.gather import PIECE_BYTES, read_exact
from gemcut.types import DTYPE_BYTES, F64, TensorRef

Tick = Callable[[], None]
"""Called between pieces; raises to stop."""

_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip


def decode(dtype: str, raw: memoryview | NDArray[np.uint8]) -> F64 | None:
    """Little-endian bytes → float64 `[n]`; None for a dtype without a numpy reading (fp8)."""
    if dtype == "BF16":
        high = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return high.view(np.float32).astype(np.float64)
    if dtype not in _NUMPY:
        return None
    return np.frombuffer(raw, dtype=_NUMPY[dtype]).astype(np.float64)


def relative_change(
    fd_before: int, before: TensorRef, fd_after: int, after: TensorRef, tick: Tick = lambda: None
) -> float | None:
    """‖after − before‖₂ / ‖before‖₂ over all elements.

    Sums of squares accumulate in float64, a piece at a time. None where it says nothing: a dtype that is not
    decoded, a zero `before`, or a value that is not finite.
    """
    change = norm = 0.0
    # counted in elements, so that pieces end on whole ones in both dtypes
    step = PIECE_BYTES // 4
    for first in range(0, before.elements, step):
        n = min(step, before.elements - first)
        tick()
        with np.errstate(invalid="ignore", over="ignore"):
            old = decode(before.dtype, _elements(fd_before, before, first, n))
            new = decode(after.dtype, _elements(fd_after, after, first, n))
            if old is None or new is None:
                return None
            new -= old
            change += float(np.dot(new, new))
            norm += float(np.dot(old, old))
    ratio = math.sqrt(change) / math.sqrt(norm) if norm > 0 and math.isfinite(norm) else math.nan
    return ratio if math.isfinite(ratio) else None


def _elements(fd: int, ref: TensorRef, first: int, n: int) -> memoryview:
    size = DTYPE_BYTES[ref.dtype]
    view = memoryview(bytearray(n * size))
    read_exact(fd, ref.start + first * size, view)
    return view


@dataclass(frozen=True, slots=True)
class Zeroed:
    """Positions of an axis that differ from before, all of them zero now."""

    axis: int
    index: tuple[int, ...]


def zeroed(
    fd_before: int, before: TensorRef, fd_after: int, after: TensorRef, tick: Tick = lambda: None
) -> Zeroed | None:
    """The axis along which every difference is a position written with zeros; None where there is no such axis.

    Where several axes would do (everything was zeroed), the one with the smallest share of positions wins.
    """
    rank = len(before.shape)
    changed = [np.zeros(n, dtype=bool) for n in before.shape]
    alive = [np.zeros(n, dtype=bool) for n in before.shape]  # holds a byte that is not zero
    for prefix, split, low, shape, offset, size in _blocks(before):
        tick()
        old = memoryview(bytearray(size))
        new = memoryview(bytearray(size))
        read_exact(fd_before, before.start + offset, old)
        read_exact(fd_after, after.start + offset, new)
        itemsize = DTYPE_BYTES[before.dtype]
        a = np.frombuffer(old, dtype=np.uint8).reshape(*shape, itemsize)
        b = np.frombuffer(new, dtype=np.uint8).reshape(*shape, itemsize)
        for mask, marks in ((np.any(a != b, axis=-1), changed), (np.any(b != 0, axis=-1), alive)):
            if not mask.any():
                continue
            for axis, position in enumerate(prefix):
                marks[axis][position] = True
            for axis in range(split, rank):
                others = tuple(k for k in range(rank - split) if k != axis - split)
                hit = mask.any(axis=others)
                where = slice(low, low + shape[0]) if axis == split else slice(None)
                marks[axis][where] |= hit
    fits = [axis for axis in range(rank) if changed[axis].any() and not (changed[axis] & alive[axis]).any()]
    if not fits:
        return None
    axis = min(fits, key=lambda k: (float(changed[k].mean()), k))
    return Zeroed(axis, tuple(int(i) for i in np.flatnonzero(changed[axis])))


def _blocks(ref: TensorRef) -> Iterator[tuple[tuple[int, ...], int, int, tuple[int, ...], int, int]]:
    """C-order blocks of bounded size: (prefix index, split axis, first position on it, block shape, offset, bytes)."""
    itemsize = DTYPE_BYTES[ref.dtype]
    if ref.elements == 0 or not ref.shape:
        return
    split = 0
    while split < len(ref.shape) - 1 and math.prod(ref.shape[split + 1 :]) * itemsize > PIECE_BYTES:
        split += 1
    inner = math.prod(ref.shape[split + 1 :]) * itemsize
    step = max(1, PIECE_BYTES // inner)
    offset = 0
    for prefix in itertools.product(*(range(n) for n in ref.shape[:split])):
        for low in range(0, ref.shape[split], step):
            n = min(step, ref.shape[split] - low)
            yield prefix, split, low, (n, *ref.shape[split + 1 :]), offset, n * inner
            offset += n * inner
