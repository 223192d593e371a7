"""Relative change and zeroed positions against numpy and torch-free references."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.checkpoint import values
from gemcut.checkpoint.values import decode, relative_change, zeroed
from gemcut.types import TensorRef


def own_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property: a fixture per example is not to be had."""
    folder = factory.getbasetemp() / __name__.rpartition(".")[2]
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def two(tmp: Path, a: np.ndarray, b: np.ndarray, dtype: str) -> Iterator[tuple[int, TensorRef, int, TensorRef]]:
    fds = []
    refs = []
    for name, array in (("a", a), ("b", b)):
        (tmp / name).write_bytes(array.tobytes())
        fds.append(os.open(tmp / name, os.O_RDONLY))
        refs.append(TensorRef("t", dtype, array.shape, name, 0, array.nbytes))
    yield fds[0], refs[0], fds[1], refs[1]
    for fd in fds:
        os.close(fd)


def bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype("<u2")


def test_decode() -> None:
    x = np.array([0.0, 1.0, -2.5, 3e38, 1e-30], np.float32)
    assert np.allclose(decode("BF16", bf16(x).view(np.uint8)), x, rtol=2**-7)
    assert decode("BF16", np.array([0x3F80, 0xC020], "<u2").view(np.uint8)).tolist() == [1.0, -2.5]  # type: ignore[union-attr]
    assert decode("F16", np.array([1.5], "<f2").view(np.uint8)).tolist() == [1.5]  # type: ignore[union-attr]
    assert decode("I64", np.array([-7], "<i8").view(np.uint8)).tolist() == [-7.0]  # type: ignore[union-attr]
    assert decode("F8_E4M3", np.zeros(3, np.uint8)) is None


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_relative_change_is_the_norm_ratio(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 401)).astype(np.float32)  # more than one piece
    y = x + 0.01 * rng.standard_normal(x.shape).astype(np.float32)
    store = {"F32": lambda v: v, "BF16": bf16, "F16": lambda v: v.astype(np.float16)}[dtype]
    a, b = store(x), store(y)
    exact = [decode(dtype, v.reshape(-1).view(np.uint8)) for v in (a, b)]
    with two(tmp_path, a, b, dtype) as files:
        got = relative_change(*files)
    assert got == pytest.approx(np.linalg.norm(exact[1] - exact[0]) / np.linalg.norm(exact[0]), rel=1e-12)


def test_relative_change_says_nothing_rather_than_nonsense(tmp_path: Path) -> None:
    with two(tmp_path, np.zeros(4, "f4"), np.ones(4, "f4"), "F32") as files:
        assert relative_change(*files) is None
    with two(tmp_path, np.ones(4, "f4"), np.full(4, np.nan, "f4"), "F32") as files:
        assert relative_change(*files) is None
    with two(tmp_path, np.ones(4, "u1"), np.zeros(4, "u1"), "F8_E4M3") as files:
        assert relative_change(*files) is None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data(), st.integers(0, 99), st.sampled_from([16, 64, 4096])
)
def test_zeroed_finds_the_mask(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject, seed: int, piece: int
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    index = sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1)))
    a = np.random.default_rng(seed).integers(1, 99, shape).astype("<u2")
    b = a.copy()
    b[(slice(None),) * axis + (index,)] = 0
    with pytest.MonkeyPatch.context() as patch, two(own_folder(tmp_path_factory), a, b, "BF16") as files:
        patch.setattr(values, "PIECE_BYTES", piece)
        found = zeroed(*files)
    assert found is not None
    # several axes may explain the same bytes; what was found must explain them
    again = a.copy()
    again[(slice(None),) * found.axis + (list(found.index),)] = 0
    assert np.array_equal(again, b)
    assert len(found.index) / shape[found.axis] <= len(index) / shape[axis]


def test_zeroed_refuses_other_changes(tmp_path: Path) -> None:
    a = np.ones((4, 5), "<u2")
    b = a.copy()
    b[:, 2] = 0
    b[1, 3] = 7
    with two(tmp_path, a, b, "BF16") as files:
        assert zeroed(*files) is None
    b = a.copy()
    b[1, 2] = b[2, 3] = 0  # a scatter: no axis explains it
    with two(tmp_path, a, b, "BF16") as files:
        assert zeroed(*files) is None
