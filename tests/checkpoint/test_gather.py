"""Byte gathers against numpy: every dtype size, every axis, short runs and long ones."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.checkpoint import gather
from gemcut.checkpoint.gather import (
    check_edits,
    edited,
    is_identity,
    new_buffer,
    pieces,
    pieces_seen,
    replacing_hash,
    runs_of,
    span,
)
from gemcut.errors import CheckpointError, UsageError
from gemcut.types import Edit, Mask, Omit, Rename, Replace, Take, TensorRef

DTYPES = {"U8": "u1", "BF16": "u2", "F32": "u4", "F64": "u8"}


def own_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property: a fixture per example is not to be had."""
    folder = factory.getbasetemp() / __name__.rpartition(".")[2]
    folder.mkdir(exist_ok=True)
    return folder


def result(tmp: Path, array: np.ndarray, dtype: str, edit: Edit | None, offset: int = 3) -> bytes:
    path = tmp / "file"
    path.write_bytes(b"\xaa" * offset + array.tobytes() + b"\xbb" * 5)
    ref = TensorRef("t", dtype, array.shape, "file", offset, offset + array.nbytes)
    fd = os.open(path, os.O_RDONLY)
    try:
        return b"".join(bytes(piece) for piece in pieces(fd, ref, edit, new_buffer()))
    finally:
        os.close(fd)


def result_seen(tmp: Path, array: np.ndarray, dtype: str, edit: Take | None) -> tuple[bytes, bytes]:
    """What was shown and what was given, of the file that `result` wrote."""
    ref = TensorRef("t", dtype, array.shape, "file", 3, 3 + array.nbytes)
    fd = os.open(tmp / "file", os.O_RDONLY)
    seen = bytearray()
    try:
        given = b"".join(bytes(piece) for piece in pieces_seen(fd, ref, edit, new_buffer(), seen.extend))
    finally:
        os.close(fd)
    return bytes(seen), given


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, str, int, tuple[int, ...]]:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    index = sorted(draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1)))
    array = np.random.default_rng(draw(st.integers(0, 9))).integers(1, 200, shape).astype(DTYPES[dtype])
    return array, dtype, axis, tuple(index)


# Tiny limits drive the same small arrays through every path: long runs, whole rows, split rows.
LIMITS = [(2 << 20, 64 << 10), (2 << 20, 1), (64, 16), (16, 16)]


@pytest.mark.parametrize("limits", LIMITS)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_take_is_numpy_take(
    tmp_path_factory: pytest.TempPathFactory,
    limits: tuple[int, int],
    case: tuple[np.ndarray, str, int, tuple[int, ...]],
) -> None:
    array, dtype, axis, index = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "PIECE_BYTES", limits[0])
        patch.setattr(gather, "_LONG_RUN_BYTES", limits[1])
        got = result(own_folder(tmp_path_factory), array, dtype, Take(axis, index))
        assert got == np.take(array, index, axis).tobytes()
        for edit in (Take(axis, index), None):
            seen, given = result_seen(own_folder(tmp_path_factory), array, dtype, edit)
            assert seen == array.tobytes()
            assert given == (got if edit is not None else seen)


@pytest.mark.parametrize("limits", LIMITS)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_mask_writes_zeros_there_and_nowhere_else(
    tmp_path_factory: pytest.TempPathFactory,
    limits: tuple[int, int],
    case: tuple[np.ndarray, str, int, tuple[int, ...]],
) -> None:
    array, dtype, axis, index = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "PIECE_BYTES", limits[0])
        patch.setattr(gather, "_LONG_RUN_BYTES", limits[1])
        got = result(own_folder(tmp_path_factory), array, dtype, Mask(axis, index))
    wanted = array.copy()
    wanted[(slice(None),) * axis + (list(index),)] = 0
    assert got == wanted.tobytes()


def test_large_tensors_in_real_limits(tmp_path: Path) -> None:
    """Experts (long runs), head columns (short runs in long rows), and a row longer than the buffer."""
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 60000, (6, 400, 700)).astype("u2")
    assert result(tmp_path, experts, "BF16", Take(0, (0, 1, 4))) == experts[[0, 1, 4]].tobytes()
    o_proj = rng.integers(0, 60000, (900, 4096)).astype("u2")
    columns = tuple(range(256, 512)) + tuple(range(1024, 2048))
    assert result(tmp_path, o_proj, "BF16", Take(1, columns)) == o_proj[:, columns].tobytes()
    masked = o_proj.copy()
    masked[:, columns] = 0
    assert result(tmp_path, o_proj, "BF16", Mask(1, columns)) == masked.tobytes()
    wide = rng.integers(0, 250, (2, 3_000_000)).astype("u1")
    odd = np.flatnonzero(np.arange(3_000_000) // 37 % 2)
    assert result(tmp_path, wide, "U8", Take(1, tuple(odd.tolist()))) == wide[:, odd].tobytes()


def test_other_edits(tmp_path: Path) -> None:
    array = np.arange(12, dtype="u2")
    assert result(tmp_path, array, "BF16", None) == array.tobytes()
    assert result(tmp_path, array, "BF16", Rename("x")) == array.tobytes()
    assert result(tmp_path, array, "BF16", Mask(0, ())) == array.tobytes()
    assert result(tmp_path, array, "BF16", Omit()) == b""
    other = np.arange(100, 112, dtype="u2")
    (tmp_path / "other").write_bytes(b"??" + other.tobytes() + b"!")
    stored = TensorRef("elsewhere", "BF16", (12,), "other", 2, 26)
    swap = Replace(tmp_path / "other", stored)
    assert result(tmp_path, array, "BF16", swap) == other.tobytes()
    assert replacing_hash(swap) == blake3(other.tobytes()).hexdigest()
    taken = Replace(tmp_path / "other", stored, Take(0, (1, 2, 11)))
    assert result(tmp_path, array, "BF16", taken) == other[[1, 2, 11]].tobytes()
    assert edited(TensorRef("t", "BF16", (12,), "s", 0, 24), taken).shape == (3,)  # type: ignore[union-attr]
    assert result(tmp_path, np.zeros((3, 0), "u2"), "BF16", Take(0, (1,))) == b""


@given(st.sets(st.integers(0, 60)))
def test_runs_cover_the_index(index: set[int]) -> None:
    runs = runs_of(sorted(index))
    assert [i for a, b in runs for i in range(a, b)] == sorted(index)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(runs))


def test_a_replacement_that_is_gone_or_short_is_an_error(tmp_path: Path) -> None:
    swap = Replace(tmp_path / "gone", TensorRef("t", "U8", (4,), "gone", 0, 4))
    with pytest.raises(CheckpointError, match="cannot read the tensor that replaces another"):
        replacing_hash(swap)
    (tmp_path / "gone").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="ended before"):
        replacing_hash(swap)


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    with pytest.raises(CheckpointError, match="ended before"):
        list(span(fd, 4, 20, new_buffer()))
    os.close(fd)


REF = TensorRef("t", "BF16", (4, 6), "s", 0, 48)


def swap(shape: tuple[int, ...] = (4, 6), dtype: str = "BF16", then: Take | None = None) -> Replace:
    return Replace(Path("elsewhere"), TensorRef("u", dtype, shape, "elsewhere", 8, 56), then)


@pytest.mark.parametrize(
    "edit",
    [Take(2, (0,)), Take(-1, (0,)), Take(0, ()), Take(0, (1, 1)), Take(0, (2, 1)), Take(0, (-1, 0)), Take(1, (5, 6)),
     Mask(1, (6,)), Mask(0, (3, 2)), swap((6, 4)), swap((4, 6, 1)), swap(dtype="F16"), swap(then=Take(1, (6,)))],
)  # fmt: skip
def test_edits_that_do_not_fit_are_refused(edit: Edit) -> None:
    with pytest.raises(CheckpointError, match=r"t\b"):
        check_edits({"t": REF}, {"t": edit})


def test_names_are_checked() -> None:
    other = TensorRef("u", "BF16", (1,), "s", 48, 50)
    with pytest.raises(CheckpointError, match="does not have"):
        check_edits({"t": REF}, {"nope": Omit()})
    with pytest.raises(CheckpointError, match="one name"):
        check_edits({"t": REF, "u": other}, {"u": Rename("t")})
    with pytest.raises(UsageError, match="leave no tensor"):
        check_edits({"t": REF}, {"t": Omit()})
    check_edits({"t": REF, "u": other}, {"u": Rename("t"), "t": Rename("u")})


def test_shape_and_identity() -> None:
    assert edited(REF, Take(1, (0, 2))).shape == (4, 2)  # type: ignore[union-attr]
    assert edited(REF, Omit()) is None
    assert edited(REF, Rename("x")).name == "x"  # type: ignore[union-attr]
    assert is_identity(REF, Take(1, tuple(range(6))))
    assert is_identity(REF, Mask(1, ()))
    assert not is_identity(REF, Take(1, (0,)))
    assert not is_identity(REF, swap())
    check_edits({"t": REF}, {"t": swap(then=Take(1, (0, 5)))})
