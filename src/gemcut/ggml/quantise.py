"""llama.cpp's own quantisers: the bytes of `ggml_quantize_chunk`, whatever the number of threads.

ggml's asserts end the process, so everything they look at is checked here first: shapes, finite values, a magnitude
that 32-bit sums of squares can hold, importances that are there where they must be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import CheckpointError, UsageError
from gemcut.ggml.library import Library, ToFloat, load
from gemcut.ggml.types import BLOCKS, NEED_IMATRIX, GgmlType, fits, tensor_bytes
from gemcut.types import F32

U8: TypeAlias = NDArray[np.uint8]

# Elements that one call of the quantiser takes: 1 MiB of float32, so that the check before it leaves them in the cache.
_PIECE = 1 << 18

# Whole numbers are stored as they are, and F64 has no quantiser.
_NO_QUANTISER = frozenset({GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64, GgmlType.F64})

# Sums of importance · value⁴ over 256 columns must stay finite in float32 (3.4e38), or the search for a scale compares
# NaN and asserts. No weight of a working model is near these.
VALUE_LIMIT = 1e6
IMPORTANCE_LIMIT = 1e12
# Types without a search and without scales: whatever they can hold. Nothing that they write needs a look afterwards.
_PLAIN_LIMIT = {GgmlType.F32: np.inf, GgmlType.F16: 65504.5, GgmlType.BF16: 3.3895e38}


def requires_imatrix(kind: GgmlType) -> bool:
    """Whether this type has no quantiser without importances, whatever the tensor."""
    return kind in NEED_IMATRIX


def quantise(
    values: F32,
    kind: GgmlType,
    importance: F32 | None,
    out: U8 | memoryview,
    *,
    threads: int = 1,
    name: str = "tensor",
    library: Library | None = None,
) -> None:
    """Write `values` as `kind` into `out`: exactly the bytes of one `ggml_quantize_chunk` over all rows.

    Rows are quantised apart from one another, so threads that take runs of rows change nothing. The interpreter's lock
    is released while the library works.

    Args:
        values: float32 [rows, columns], contiguous; columns a multiple of the type's block.
        importance: float32 [columns], at least 0: weights of the squared error of each column, the same in every row
            (E[a²] of the input); None: the type's own choice.
        out: writable, contiguous, exactly `tensor_bytes(kind, values.shape)` bytes.
        name: of the tensor, for errors.
    Raises:
        UsageError: shapes, dtypes or sizes do not fit; the type has no quantiser; importances are missing.
        CheckpointError: a value or importance is not finite, too large, or an importance is negative; or the type
            cannot hold the values (a scale overflows its 16 bits).
    """
    library = load() if library is None else library
    target = _check_call(values, kind, importance, out, name)
    if importance is not None:
        _check_importance(importance, name)
    rows, columns = values.shape
    library.dll.ggml_quantize_init(kind)
    job = _Job(values, kind, importance, target, tensor_bytes(kind, (columns,)), name, library)
    step = max(1, _PIECE // columns)
    starts = range(0, rows, step)
    if threads <= 1 or len(starts) == 1:
        for start in starts:
            job.run(start, min(start + step, rows))
        return
    with ThreadPoolExecutor(min(threads, len(starts))) as pool:
        for _ in pool.map(lambda start: job.run(start, min(start + step, rows)), starts):
            pass


def dequantise(raw: U8 | memoryview, kind: GgmlType, shape: Sequence[int], *, library: Library | None = None) -> F32:
    """What stored bytes stand for, float32 in the given shape (rows first).

    Raises:
        UsageError: the bytes are not those of such a tensor; the type is one of whole numbers.
    """
    library = load() if library is None else library
    source = np.frombuffer(raw, dtype=np.uint8)
    if source.size != (wanted := tensor_bytes(kind, shape)):
        raise UsageError(f"bytes of a {kind.name} tensor {tuple(shape)}", got=source.size, wanted=wanted)
    if kind is GgmlType.F32:
        return source.view(np.float32).reshape(shape).copy()
    if kind in _NO_QUANTISER:
        raise UsageError(f"{kind.name} is not a type of weights")
    out = np.empty(prod(shape), dtype=np.float32)
    columns = shape[-1] if shape else 1
    if out.size:
        row_bytes = tensor_bytes(kind, (columns,))
        to_float = _to_float(library, kind)
        step = max(1, _PIECE // columns)
        for start in range(0, out.size // columns, step):
            stop = min(start + step, out.size // columns)
            to_float(
                source.ctypes.data + start * row_bytes, out[start * columns :].ctypes.data, (stop - start) * columns
            )
    return out.reshape(shape)


@lru_cache(maxsize=64)
def _to_float(library: Library, kind: GgmlType) -> Callable[[int, int, int], None]:
    function: Callable[[int, int, int], None] = ToFloat(library.dll.ggml_get_type_traits(kind).contents.to_float)
    return function


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    values: F32
    kind: GgmlType
    importance: F32 | None
    target: U8
    row_bytes: int
    name: str
    library: Library

    def run(self, start: int, stop: int) -> None:
        """Rows start … stop: checked, quantised, and the scales that were written checked."""
        part = self.values[start:stop]
        limit = _PLAIN_LIMIT.get(self.kind, VALUE_LIMIT)
        low, high = float(part.min()), float(part.max())
        if not (-limit < low and high < limit):
            self._refuse(start, part, limit)
        columns = part.shape[1]
        out = self.target[start * self.row_bytes : stop * self.row_bytes]
        dll = self.library.dll
        weights = None if self.importance is None else self.importance.ctypes.data
        written = dll.ggml_quantize_chunk(
            self.kind, part.ctypes.data, out.ctypes.data, 0, stop - start, columns, weights
        )
        checked = self.kind in _PLAIN_LIMIT or dll.ggml_validate_row_data(self.kind, out.ctypes.data, out.size)
        if written != out.size or not checked:
            raise CheckpointError(
                f"{self.kind.name} cannot hold these values", where=f"{self.name}, rows {start} to {stop - 1}",
                got=f"values from {low:g} to {high:g}",
            )  # fmt: skip

    def _refuse(self, start: int, part: F32, limit: float) -> None:
        bad = ~(np.abs(part) < limit)
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{int(bad.sum())} values cannot be quantised",
            where=f"{self.name}, first at row {start + row}, column {column}",
            got=float(part[row, column]),
            wanted="finite values" if limit == np.inf else f"finite values below {limit:g}",
        )


def _check_call(values: F32, kind: GgmlType, importance: F32 | None, out: U8 | memoryview, name: str) -> U8:
    if values.ndim != 2 or values.dtype != np.float32 or not values.flags.c_contiguous or values.size == 0:
        got = f"{values.dtype} {list(values.shape)}"
        raise UsageError("a quantiser takes rows of float32", where=name, got=got, wanted="contiguous [rows, columns]")
    rows, columns = values.shape
    if kind in _NO_QUANTISER:
        raise UsageError(f"nothing is quantised to {kind.name}", where=name)
    if not fits(kind, columns):
        wanted = f"a multiple of {BLOCKS[kind].values}"
        raise UsageError(f"rows cannot be stored as {kind.name}", where=name, got=f"{columns} columns", wanted=wanted)
    if importance is None and requires_imatrix(kind):
        raise UsageError(f"{kind.name} needs an importance matrix", where=name, hint="give --imatrix, or another type")
    if importance is not None:
        plain = importance.dtype == np.float32 and importance.flags.c_contiguous
        if importance.shape != (columns,) or not plain:
            got = f"{importance.dtype} {list(importance.shape)}"
            raise UsageError("importances of another shape", where=name, got=got, wanted=f"float32 [{columns}]")
    target = np.frombuffer(out, dtype=np.uint8)
    if not target.flags.writeable or target.size != tensor_bytes(kind, (rows, columns)):
        wanted = f"{tensor_bytes(kind, (rows, columns))} writable"
        raise UsageError("the output has another size", where=name, got=f"{target.size} bytes", wanted=wanted)
    return target


def _check_importance(importance: F32, name: str) -> None:
    low, high = float(importance.min()), float(importance.max())
    if not (low >= 0 and high <= IMPORTANCE_LIMIT):
        column = int(np.flatnonzero(~((importance >= 0) & (importance <= IMPORTANCE_LIMIT)))[0])
        raise CheckpointError(
            "an importance cannot be used", where=f"{name}, column {column}", got=float(importance[column]),
            wanted=f"a finite number from 0 to {IMPORTANCE_LIMIT:g}",
        )  # fmt: skip
