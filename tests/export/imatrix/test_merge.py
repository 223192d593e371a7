from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.export.imatrix.small import DENSE, EXPERTS, small

from gemcut.errors import CheckpointError, UsageError
from gemcut.export.imatrix import Entry, Imatrix, merge
from gemcut.export.imatrix.entries import entry_of
from gemcut.export.imatrix.starved import shrink, starved_units


def shrunk(imatrix: Imatrix, prior: int) -> Imatrix:
    entry = imatrix.entries[EXPERTS]
    units = starved_units(entry.counts)
    more = entry_of(*shrink(entry.sums.astype(np.float64), entry.counts.astype(np.float64), units, prior))
    return replace(imatrix, entries={**imatrix.entries, EXPERTS: more}, prior_tokens=prior, starved={EXPERTS: units})


def test_sums_and_counts_add() -> None:
    a, b = small(0), replace(small(1), datasets=("other.txt",), chunks=5)
    both = merge(a, b)
    for name in (DENSE, EXPERTS):
        np.testing.assert_allclose(both.entries[name].sums, a.entries[name].sums + b.entries[name].sums, rtol=1e-6)
        np.testing.assert_array_equal(both.entries[name].counts, a.entries[name].counts + b.entries[name].counts)
    assert both.chunks == 7
    assert both.datasets == ("text.txt", "other.txt")


def test_merging_does_not_count_borrowed_rows() -> None:
    a, b = small(0, counts=(500, 4, 400, 450)), small(1, counts=(300, 200, 250, 2))
    plain = merge(a, b)
    both = merge(shrunk(a, 32), shrunk(b, 32))
    assert both.starved == {}  # together nobody starves
    np.testing.assert_array_equal(both.entries[EXPERTS].counts, plain.entries[EXPERTS].counts)
    np.testing.assert_allclose(both.entries[EXPERTS].sums, plain.entries[EXPERTS].sums, rtol=1e-4)


def test_who_starves_in_both_borrows_from_both() -> None:
    a, b = small(0, counts=(500, 4, 400, 450)), small(1, counts=(300, 2, 250, 320))
    both = merge(shrunk(a, 32), shrunk(b, 32))
    assert both.starved == {EXPERTS: (1,)}
    assert both.tokens(EXPERTS).tolist() == [800, 6, 650, 770]
    assert both.entries[EXPERTS].counts.tolist() == [800, 38, 650, 770]


def test_only_sums_of_squares_of_one_model_add_up() -> None:
    with pytest.raises(UsageError, match="do not add up"):
        merge(small(), replace(small(), variant="rms4"))
    with pytest.raises(UsageError, match="lost its counts"):
        merge(small(), replace(small(), chunk_size=0))
    with pytest.raises(UsageError, match="count twice"):
        merge(replace(small(), corpus_hash="a" * 64), replace(small(1), corpus_hash="a" * 64))
    with pytest.raises(CheckpointError, match="different models"):
        merge(replace(small(), model_fingerprint="a" * 64), replace(small(), model_fingerprint="b" * 64))
    with pytest.raises(CheckpointError, match="only in one"):
        merge(small(), replace(small(), entries={DENSE: small().entries[DENSE]}))
    odd = Entry(np.ones((1, 9), np.float32), np.ones(1, np.int64))
    with pytest.raises(CheckpointError, match="two shapes"):
        merge(small(), replace(small(), entries={**small().entries, DENSE: odd}))
