"""Edits as byte gathers: what a tensor looks like after an edit, and its bytes in order, from a bounded buffer.

A tensor is seen as bytes `[outer, position, inner]` around the edited axis. No dtype is decoded, so every dtype that
has whole bytes passes through, fp8 included.
"""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from gemcut.errors import CheckpointError, UsageError
from gemcut.types import DTYPE_BYTES, Edit, Edits, Mask, Omit, Rename, Replace, Take, TensorRef

PIECE_BYTES = 512 << 10  # one piece in flight; stays in a core's cache between read, compare and hash
_LONG_RUN_BYTES = 64 << 10  # from here on, reading only the kept runs beats reading everything and gathering


def check_edits(tensors: Mapping[str, TensorRef], edits: Edits) -> None:
    """Refuse edits that name no tensor, leave its bounds, or make two tensors of one name.

    Raises:
        CheckpointError: a name, axis, index or size does not fit the checkpoint.
    """
    for name, edit in edits.items():
        ref = tensors.get(name)
        if ref is None:
            raise CheckpointError("an edit names a tensor that the checkpoint does not have", where=name[:200])
        if isinstance(edit, Take | Mask):
            _check_index(ref, edit)
        elif isinstance(edit, Replace):
            if (edit.ref.dtype, edit.ref.shape) != (ref.dtype, ref.shape):
                raise CheckpointError(
                    "the tensor that replaces another must have its shape and dtype",
                    where=name,
                    got=f"{edit.ref.dtype} {list(edit.ref.shape)}",
                    wanted=f"{ref.dtype} {list(ref.shape)}",
                )
            if edit.then is not None:
                _check_index(ref, edit.then)
    names = [new.name for ref in tensors.values() if (new := edited(ref, edits.get(ref.name))) is not None]
    if not names:
        raise UsageError("the edits leave no tensor")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise CheckpointError("the edits give two tensors one name", where=twice)


def _check_index(ref: TensorRef, edit: Take | Mask) -> None:
    verb = "take" if isinstance(edit, Take) else "mask"
    if not 0 <= edit.axis < len(ref.shape):
        raise CheckpointError(f"{verb}: no such axis", where=ref.name, got=edit.axis, wanted=f"shape {list(ref.shape)}")
    if isinstance(edit, Take) and not edit.index:
        raise CheckpointError("take: nothing would be kept", where=ref.name)
    index = edit.index
    if any(b <= a for a, b in itertools.pairwise(index)):
        raise CheckpointError(f"{verb}: the index is not strictly increasing", where=ref.name)
    if index and (index[0] < 0 or index[-1] >= ref.shape[edit.axis]):
        raise CheckpointError(
            f"{verb}: the index leaves the tensor",
            where=ref.name,
            got=f"{index[0]}…{index[-1]}",
            wanted=f"0…{ref.shape[edit.axis] - 1}",
        )


def edited(ref: TensorRef, edit: Edit | None) -> TensorRef | None:
    """Name and shape after the edit (offsets are meaningless); None where it leaves the tensor out."""
    match edit:
        case Omit():
            return None
        case Rename(to=to):
            return replace(ref, name=to)
        case Take(axis=axis, index=index):
            return replace(ref, shape=(*ref.shape[:axis], len(index), *ref.shape[axis + 1 :]))
        case Replace(then=then):
            return edited(ref, then)
        case _:
            return ref


def is_identity(ref: TensorRef, edit: Edit | None) -> bool:
    """The edit changes neither name nor bytes, whatever the tensor holds."""
    match edit:
        case None:
            return True
        case Take(axis=axis, index=index):
            return len(index) == ref.shape[axis]
        case Mask(index=index):
            return not index
        case Rename(to=to):
            return to == ref.name
        case _:
            return False


@dataclass(frozen=True, slots=True)
class AxisView:
    """A tensor as bytes `[outer, positions, inner]` around one axis."""

    outer: int
    positions: int
    inner: int

    @classmethod
    def of(cls, ref: TensorRef, axis: int) -> AxisView:
        """The view of `ref` around `axis`."""
        inner = DTYPE_BYTES[ref.dtype] * math.prod(ref.shape[axis + 1 :])
        return cls(math.prod(ref.shape[:axis]), ref.shape[axis], inner)

    def coarser(self, runs: Sequence[tuple[int, int]]) -> tuple[AxisView, list[tuple[int, int]]]:
        """The same runs over the widest positions that they all align with: heads, not single columns."""
        g = math.gcd(self.positions, *(edge for run in runs for edge in run))
        if g <= 1:
            return self, list(runs)
        return AxisView(self.outer, self.positions // g, self.inner * g), [(a // g, b // g) for a, b in runs]


def runs_of(index: Sequence[int]) -> list[tuple[int, int]]:
    """Increasing positions as half-open runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def read_exact(fd: int, start: int, view: memoryview) -> None:
    """Fill `view` from the file; a file that ends early is an error, not a short read."""
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], start + done)
        if n == 0:
            raise CheckpointError(
                "a shard ended before its tensors did", hint="did it change on disk while it was read?"
            )
        done += n


def new_buffer() -> memoryview:
    """A buffer for `pieces` and `span`; one per thread."""
    return memoryview(bytearray(PIECE_BYTES))


def span(fd: int, start: int, size: int, buffer: memoryview) -> Iterator[memoryview]:
    """Bytes `start : start + size` of a file, piece by piece. A piece is valid until the next one is asked for."""
    for at in range(start, start + size, len(buffer)):
        view = buffer[: min(len(buffer), start + size - at)]
        read_exact(fd, at, view)
        yield view


def pieces(fd: int, ref: TensorRef, edit: Edit | None, buffer: memoryview) -> Iterator[memoryview]:
    """The edited tensor's bytes in order. A piece is valid until the next one is asked for."""
    match edit:
        case Omit():
            return
        case Replace():
            yield from _replacing(edit, buffer)
        case Take(axis=axis, index=index):
            yield from _gather(fd, ref.start, AxisView.of(ref, axis), runs_of(index), buffer, zero=False)
        case Mask(axis=axis, index=index) if index:
            yield from _gather(fd, ref.start, AxisView.of(ref, axis), runs_of(index), buffer, zero=True)
        case _:
            yield from span(fd, ref.start, ref.size_bytes, buffer)


def _replacing(edit: Replace, buffer: memoryview) -> Iterator[memoryview]:
    try:
        fd = os.open(edit.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the tensor that replaces another: {error.strerror}",
            where=f"{edit.ref.name} in {edit.path.name}",
        ) from None
    try:
        yield from pieces(fd, edit.ref, edit.then, buffer)
    finally:
        os.close(fd)


def replacing_hash(edit: Replace) -> str:
    """BLAKE3, in hex, of the bytes that the edit puts in place.

    Raises:
        CheckpointError: the file is gone, or shorter than the tensor.
    """
    digest = blake3()
    for piece in _replacing(edit, new_buffer()):
        digest.update(piece)
    return digest.hexdigest()


def pieces_seen(
    fd: int, ref: TensorRef, edit: Take | None, buffer: memoryview, see: Callable[[memoryview], object]
) -> Iterator[memoryview]:
    """`pieces`, while `see` is shown every byte of the tensor as it was, once and in order: one read serves both."""
    if edit is None:
        for piece in span(fd, ref.start, ref.size_bytes, buffer):
            see(piece)
            yield piece
        return
    view, runs = AxisView.of(ref, edit.axis).coarser(runs_of(edit.index))
    if not _are_long(view, runs):
        for piece in span(fd, ref.start, ref.size_bytes, buffer):
            see(piece)
        yield from pieces(fd, ref, edit, buffer)
        return
    for o in range(view.outer):
        row = ref.start + o * view.positions * view.inner
        at = 0
        for a, b in [*runs, (view.positions, view.positions)]:
            for piece in span(fd, row + at * view.inner, (a - at) * view.inner, buffer):
                see(piece)
            for piece in span(fd, row + a * view.inner, (b - a) * view.inner, buffer):
                see(piece)
                yield piece
            at = b


def _are_long(view: AxisView, runs: list[tuple[int, int]]) -> bool:
    return bool(runs) and sum(b - a for a, b in runs) * view.inner >= len(runs) * _LONG_RUN_BYTES


def _gather(
    fd: int, start: int, view: AxisView, runs: list[tuple[int, int]], buffer: memoryview, *, zero: bool
) -> Iterator[memoryview]:
    """Take the runs, or (zero) everything with zeros in the runs."""
    if view.outer * view.positions * view.inner == 0:
        return
    view, runs = view.coarser(runs)
    if _are_long(view, runs):
        yield from _long_runs(fd, start, view, runs, buffer, zero=zero)
        return
    # Short runs: read whole blocks and gather in memory. Here inner < 64 KiB, so a position fits the buffer.
    step = max(1, min(view.positions, len(buffer) // view.inner))
    rows = max(1, len(buffer) // (view.positions * view.inner)) if step == view.positions else 1
    starts = [a for a, _ in runs]
    for o in range(0, view.outer, rows):
        n = min(rows, view.outer - o)
        for first in range(0, view.positions, step):
            last = min(view.positions, first + step)
            block = buffer[: n * (last - first) * view.inner]
            read_exact(fd, start + (o * view.positions + first) * view.inner, block)
            low = max(0, bisect_left(starts, first) - 1)
            inside = [(max(a, first) - first, min(b, last) - first) for a, b in _until(runs, low, last) if b > first]
            grid = np.frombuffer(block, dtype=np.dtype(f"V{view.inner}")).reshape(n, last - first)
            if zero:
                raw = np.frombuffer(block, dtype=np.uint8).reshape(n, last - first, view.inner)
                for a, b in inside:
                    raw[:, a:b] = 0
                yield block
            elif inside:
                yield _taken(grid, inside)


def _until(runs: list[tuple[int, int]], low: int, last: int) -> Iterator[tuple[int, int]]:
    while low < len(runs) and runs[low][0] < last:
        yield runs[low]
        low += 1


def _taken(grid: NDArray[np.void], inside: list[tuple[int, int]]) -> memoryview:
    if inside == [(0, grid.shape[1])]:
        return grid.view(np.uint8).reshape(-1).data
    index = np.concatenate([np.arange(a, b) for a, b in inside])
    return grid.take(index, axis=1).view(np.uint8).reshape(-1).data


def _long_runs(
    fd: int, start: int, view: AxisView, runs: list[tuple[int, int]], buffer: memoryview, *, zero: bool
) -> Iterator[memoryview]:
    zeros = memoryview(bytes(len(buffer))) if zero else buffer
    for o in range(view.outer):
        row = start + o * view.positions * view.inner
        at = 0
        for a, b in [*runs, (view.positions, view.positions)]:
            if zero:
                yield from span(fd, row + at * view.inner, (a - at) * view.inner, buffer)
                left = (b - a) * view.inner
                for done in range(0, left, len(zeros)):
                    yield zeros[: min(len(zeros), left - done)]
            else:
                yield from span(fd, row + a * view.inner, (b - a) * view.inner, buffer)
            at = b
