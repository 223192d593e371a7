from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from tests.export.imatrix.small import DENSE, EXPERTS, small, small_layout

from gemcut.errors import CheckpointError
from gemcut.export.imatrix import Entry, fit, missing_entries


def test_importance_is_the_mean_square_in_float32() -> None:
    imatrix = small(counts=(7, 3, 1, 900))
    entry = imatrix.entries[EXPERTS]
    for unit in range(4):
        found = imatrix.importance(EXPERTS, unit)
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, entry.sums[unit] / np.float32(entry.counts[unit]))


def test_an_expert_without_rows_has_ones() -> None:
    found = small(counts=(7, 0, 1, 900)).importance(EXPERTS, 1)
    np.testing.assert_array_equal(found, np.ones(8, np.float32))


def test_a_tensor_without_entry_has_none() -> None:
    assert small().importance("blk.7.attn_q.weight") is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_impossible_sums_are_refused(bad: float) -> None:
    sums = np.ones((2, 4), np.float32)
    sums[1, 2] = bad
    with pytest.raises(CheckpointError):
        Entry(sums, np.ones(2, np.int64))


def test_negative_counts_are_refused() -> None:
    with pytest.raises(CheckpointError):
        Entry(np.ones((2, 4), np.float32), np.array([3, -1]))


def test_one_count_for_all_experts_counts_for_each() -> None:
    imatrix = small()
    flat = Entry(imatrix.entries[EXPERTS].sums.reshape(1, -1), np.array([50], np.int64))
    found = fit(replace(imatrix, entries={**imatrix.entries, EXPERTS: flat}), small_layout())
    assert found.entries[EXPERTS].sums.shape == (4, 8)
    assert found.entries[EXPERTS].counts.tolist() == [50] * 4


def test_another_models_names_and_shapes_are_refused() -> None:
    imatrix = small()
    with pytest.raises(CheckpointError, match="names a tensor"):
        fit(
            replace(imatrix, entries={**imatrix.entries, "blk.9.attn_q.weight": imatrix.entries[DENSE]}), small_layout()
        )
    for layout in (small_layout(columns=16), small_layout(units=3)):
        with pytest.raises(CheckpointError, match="another shape"):
            fit(imatrix, layout)


def test_missing_tensors_are_named(caplog: pytest.LogCaptureFixture) -> None:
    imatrix = replace(small(), entries={DENSE: small().entries[DENSE]})
    assert missing_entries(imatrix, small_layout()) == (EXPERTS,)
    with caplog.at_level(logging.WARNING):
        fit(imatrix, small_layout())
    assert EXPERTS in caplog.text
