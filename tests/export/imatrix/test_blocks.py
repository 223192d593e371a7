from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemcut.export.imatrix.blocks import Roundings, choose_blocks, quantise_blocks, roundings
from gemcut.ggml.quantise import dequantise, quantise
from gemcut.ggml.types import GgmlType, tensor_bytes

COLUMNS = 512
U8 = NDArray[np.uint8]


def given_for(count: int, seed: int = 0, columns: int = COLUMNS) -> Roundings:
    """Inputs with a strong mean."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(columns).astype(np.float32)
    spread = rng.lognormal(0, 1, columns).astype(np.float32)
    return Roundings(roundings(mean**2 + spread, count), mean, spread)


def weights(rows: int = 24, seed: int = 1, columns: int = COLUMNS) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


def stored(
    values: np.ndarray, kind: GgmlType, picked: Roundings | None = None, importance: object = None
) -> np.ndarray:
    raw = np.empty(tensor_bytes(kind, values.shape), np.uint8)
    if picked is None:
        quantise(values, kind, importance, raw)  # type: ignore[arg-type]
    else:
        quantise_blocks(values, kind, picked, raw)
    return raw


def error(values: np.ndarray, raw: np.ndarray, kind: GgmlType, by: Roundings) -> np.ndarray:
    """Per row, what the choice is judged by."""
    off = (values - dequantise(raw, kind, values.shape)).astype(np.float64)
    return (off**2) @ by.spread + (off @ by.mean) ** 2


@pytest.mark.parametrize("kind", [GgmlType.IQ2_S, GgmlType.Q3_K, GgmlType.IQ4_NL, GgmlType.Q4_0, GgmlType.Q6_K])
def test_picked_blocks_are_better_in_every_row(kind: GgmlType) -> None:
    values, by = weights(), given_for(6)
    once = error(values, stored(values, kind, importance=by.importances[0]), kind, by)
    picked = error(values, stored(values, kind, by), kind, by)
    assert (picked <= once * 1.0001).all()
    assert picked.sum() < 0.95 * once.sum()


def test_one_rounding_is_the_quantiser_itself() -> None:
    values, by = weights(), given_for(1)
    np.testing.assert_array_equal(
        stored(values, GgmlType.Q4_K, by), stored(values, GgmlType.Q4_K, importance=by.importances[0])
    )


def test_rows_are_taken_apart() -> None:
    values, by = weights(), given_for(4)
    whole = stored(values, GgmlType.IQ3_S, by)
    parts = [stored(values[a:b], GgmlType.IQ3_S, by) for a, b in ((0, 5), (5, 6), (6, 24))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_roundings_are_the_same_every_time_and_begin_with_what_was_given() -> None:
    importance = np.random.default_rng(0).random(40).astype(np.float32)
    a, b = roundings(importance, 5), roundings(importance, 5)
    np.testing.assert_array_equal(np.stack(a), np.stack(b))
    np.testing.assert_array_equal(a[0], importance)
    assert all((one > 0).all() and one.dtype == np.float32 for one in a)
    np.testing.assert_array_equal(np.stack(roundings(importance, 3)), np.stack(a[:3]))


def cost(local: np.ndarray, along: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    take = [np.take_along_axis(part, chosen[None], axis=0)[0] for part in (local, along)]
    return take[0].sum(-1) + take[1].sum(-1) ** 2


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_the_choice_is_a_minimum(seed: int, count: int, blocks: int) -> None:
    """Never worse than all of the first, or each block for itself; a single block is the best of all."""
    rng = np.random.default_rng(seed)
    local = rng.random((count, 3, blocks)).astype(np.float32)
    along = rng.standard_normal((count, 3, blocks)).astype(np.float32)
    chosen = choose_blocks(local, along)
    found = cost(local, along, chosen)
    every = [
        cost(local, along, np.tile(np.array(one), (3, 1))) for one in itertools.product(range(count), repeat=blocks)
    ]
    if blocks == 1:
        np.testing.assert_allclose(found, np.min(every, axis=0), rtol=1e-5)
    for start in (np.zeros((3, blocks), int), np.argmin(local + along**2, axis=0), np.argmin(local, axis=0)):
        assert (found <= cost(local, along, start) + 1e-5).all()
    assert (found >= np.min(every, axis=0) - 1e-5).all()
