"""Two stored tensors, read and compared: the edit that is *found*, both hashes, never what somebody meant to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from gemcut.checkpoint.gather import PIECE_BYTES, AxisView, new_buffer, pieces, read_exact, span
from gemcut.checkpoint.values import Tick, relative_change, zeroed
from gemcut.errors import CheckpointError
from gemcut.types import Edit, Found, Mask, Take, TensorFact, TensorRef

_SIGNATURE_ROWS = 16
_SIGNATURE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    path: Path
    ref: TensorRef


def _open(stack: ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


def tensor_fact(before: Stored | None, after: Stored | None, hint: Edit | None, tick: Tick) -> TensorFact:
    """What happened to one tensor, from its bytes.

    Args:
        hint: tried first where several edits explain the same bytes (equal experts), and to save the search. It is
            recorded only when the bytes agree with it.
    """
    with ExitStack() as stack:
        if before is None or after is None:
            only = before or after
            assert only is not None
            digest = _hash(_open(stack, only.path), only.ref, tick)
            if before is None:
                return TensorFact(only.ref.name, "added", only.ref.dtype, None, only.ref.shape, None, digest)
            return TensorFact(only.ref.name, "removed", only.ref.dtype, only.ref.shape, None, digest, None)
        old_fd = _open(stack, before.path)
        new_fd = _open(stack, after.path)
        old, new = before.ref, after.ref
        if old.dtype == new.dtype and old.shape == new.shape and old.start == new.start and _same_file(old_fd, new_fd):
            digest = _hash(old_fd, old, tick)
            return _fact(old, new, "same", digest, digest)
        if old.shape == new.shape and old.elements:
            return _same_shape(old_fd, old, new_fd, new, hint, tick)
        old_hash = _hash(old_fd, old, tick)
        take = hint if isinstance(hint, Take) and _fits(old, new, hint) else None
        if take is not None:
            agrees, new_hash = _explains(old_fd, old, take, new_fd, new, tick)
            if agrees:
                return _fact(old, new, "take", old_hash, new_hash, axis=take.axis, index=take.index)
        take = _find_take(old_fd, old, new_fd, new)
        if take is not None:
            agrees, new_hash = _explains(old_fd, old, take, new_fd, new, tick)
            if agrees:
                return _fact(old, new, "take", old_hash, new_hash, axis=take.axis, index=take.index)
        return _fact(old, new, "reshaped", old_hash, _hash(new_fd, new, tick))


def gathered_fact(old: TensorRef, new: TensorRef, edit: Take | None, before: str, meant: str, after: str) -> TensorFact:
    """The fact about a tensor that was gathered from its base while both were hashed, then read back.

    Args:
        before: BLAKE3 of the base's tensor.
        meant: BLAKE3 of the bytes that the edit takes from it.
        after: BLAKE3 of what was read back from the new file.

    Raises:
        CheckpointError: the file does not hold what was written to it.
    """
    _check_read_back(new, meant, after)
    if edit is None or len(edit.index) == old.shape[edit.axis]:
        return _fact(old, new, "same", before, after)
    return _fact(old, new, "take", before, after, axis=edit.axis, index=edit.index)


def made_fact(new: TensorRef, meant: str, after: str) -> TensorFact:
    """The fact about a tensor that was computed and then read back; see `gathered_fact`."""
    _check_read_back(new, meant, after)
    return TensorFact(new.name, "added", new.dtype, None, new.shape, None, after)


def _check_read_back(new: TensorRef, meant: str, after: str) -> None:
    if after != meant:
        raise CheckpointError(
            "what was written does not read back",
            where=f"{new.name} in {new.shard}",
            got=f"blake3 {after[:12]}…",
            wanted=f"{meant[:12]}…",
            hint="the disk or the memory of this machine is at fault, or another program wrote to the file",
        )


def changes_nothing(before: Stored, edit: Edit) -> bool:
    """The edit would give back the very same bytes: a mask over what is zero already."""
    with ExitStack() as stack:
        fd = _open(stack, before.path)
        return _explains(fd, before.ref, edit, fd, before.ref, lambda: None)[0]


def _fact(
    old: TensorRef,
    new: TensorRef,
    found: Found,
    old_hash: str,
    new_hash: str,
    *,
    axis: int | None = None,
    index: tuple[int, ...] | None = None,
    relative: float | None = None,
) -> TensorFact:
    return TensorFact(
        name=new.name,
        found=found,
        dtype=new.dtype,
        shape_before=old.shape,
        shape_after=new.shape,
        blake3_before=old_hash,
        blake3_after=new_hash,
        axis=axis,
        index=index,
        relative_change=relative,
    )


def _same_file(a: int, b: int) -> bool:
    return os.path.samestat(os.fstat(a), os.fstat(b))


def _same_shape(old_fd: int, old: TensorRef, new_fd: int, new: TensorRef, hint: Edit | None, tick: Tick) -> TensorFact:
    old_hash, new_hash = _hash_pair(old_fd, old, new_fd, new, tick)
    if old_hash == new_hash and old.dtype == new.dtype:
        return _fact(old, new, "same", old_hash, new_hash)
    relative = relative_change(old_fd, old, new_fd, new, tick)
    if old.dtype == new.dtype:
        if isinstance(hint, Mask) and _explains(old_fd, old, hint, new_fd, new, tick)[0]:
            return _fact(old, new, "mask", old_hash, new_hash, axis=hint.axis, index=hint.index, relative=relative)
        zero = zeroed(old_fd, old, new_fd, new, tick)
        if zero is not None:
            return _fact(old, new, "mask", old_hash, new_hash, axis=zero.axis, index=zero.index, relative=relative)
    return _fact(old, new, "values", old_hash, new_hash, relative=relative)


def _hash(fd: int, ref: TensorRef, tick: Tick) -> str:
    digest = blake3()
    for piece in span(fd, ref.start, ref.size_bytes, new_buffer()):
        digest.update(piece)
        tick()
    return digest.hexdigest()


def _equal(a: memoryview, b: memoryview) -> bool:
    wide = len(a) // 8 * 8
    same = np.array_equal(np.frombuffer(a[:wide], np.uint64), np.frombuffer(b[:wide], np.uint64))
    return same and bytes(a[wide:]) == bytes(b[wide:])


def _hash_pair(old_fd: int, old: TensorRef, new_fd: int, new: TensorRef, tick: Tick) -> tuple[str, str]:
    """Both hashes; as long as the bytes agree they are hashed once."""
    if old.size_bytes != new.size_bytes:
        return _hash(old_fd, old, tick), _hash(new_fd, new, tick)
    first = blake3()
    second = None
    buffer = new_buffer()
    at = new.start
    for piece in span(old_fd, old.start, old.size_bytes, new_buffer()):
        other = buffer[: len(piece)]
        read_exact(new_fd, at, other)
        at += len(piece)
        if second is None and not _equal(piece, other):
            second = first.copy()
        first.update(piece)
        if second is not None:
            second.update(other)
        tick()
    return first.hexdigest(), (second or first).hexdigest()


def _explains(old_fd: int, old: TensorRef, edit: Edit, new_fd: int, new: TensorRef, tick: Tick) -> tuple[bool, str]:
    """Whether the edit of `old` gives exactly `new`, and the hash of `new`."""
    digest = blake3()
    buffer = new_buffer()
    agrees = True
    at = new.start
    for piece in _bounded(pieces(old_fd, old, edit, new_buffer())):
        other = buffer[: min(len(piece), new.stop - at)]
        read_exact(new_fd, at, other)
        at += len(other)
        digest.update(other)
        agrees = agrees and len(other) == len(piece) and _equal(piece, other)
        tick()
    for piece in span(new_fd, at, new.stop - at, buffer):
        digest.update(piece)
        agrees = False
    return agrees, digest.hexdigest()


def _bounded(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    limit = PIECE_BYTES
    for part in parts:
        for at in range(0, len(part), limit):
            yield part[at : at + limit]


def _fits(old: TensorRef, new: TensorRef, take: Take) -> bool:
    if old.dtype != new.dtype or len(old.shape) != len(new.shape) or not 0 <= take.axis < len(old.shape):
        return False
    bounded = bool(take.index) and take.index[0] >= 0 and take.index[-1] < old.shape[take.axis]
    shape = (*old.shape[: take.axis], len(take.index), *old.shape[take.axis + 1 :])
    return bounded and new.shape == shape


def _find_take(old_fd: int, old: TensorRef, new_fd: int, new: TensorRef) -> Take | None:
    """The kept positions of the one axis that shrank, by matching sampled positions in order; a candidate only."""
    if old.dtype != new.dtype or len(old.shape) != len(new.shape) or not new.elements:
        return None
    differ = [k for k in range(len(old.shape)) if old.shape[k] != new.shape[k]]
    if len(differ) != 1 or new.shape[differ[0]] > old.shape[differ[0]]:
        return None
    axis = differ[0]
    wanted = _signatures(new_fd, new, axis)
    index: list[int] = []
    for position, signature in enumerate(_signatures(old_fd, old, axis)):
        if len(index) < len(wanted) and signature == wanted[len(index)]:
            index.append(position)
    return Take(axis, tuple(index)) if len(index) == len(wanted) else None


def _signatures(fd: int, ref: TensorRef, axis: int) -> list[bytes]:
    """A hash per position of the axis over bytes sampled at the same places in both tensors."""
    view = AxisView.of(ref, axis)
    rows = sorted({view.outer * k // _SIGNATURE_ROWS for k in range(_SIGNATURE_ROWS)})
    size = min(view.inner, _SIGNATURE_BYTES)
    skip = (view.inner - size) // 2
    digests = [blake3() for _ in range(view.positions)]
    for o in rows:
        row = ref.start + o * view.positions * view.inner
        if view.inner > 4096:
            piece = memoryview(bytearray(size))
            for position, digest in enumerate(digests):
                read_exact(fd, row + position * view.inner + skip, piece)
                digest.update(piece)
            continue
        per_read = max(1, PIECE_BYTES // view.inner)
        for first in range(0, view.positions, per_read):
            last = min(view.positions, first + per_read)
            block = memoryview(bytearray((last - first) * view.inner))
            read_exact(fd, row + first * view.inner, block)
            for k, digest in enumerate(digests[first:last]):
                digest.update(block[k * view.inner + skip : k * view.inner + skip + size])
    return [digest.digest() for digest in digests]
