from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.export.imatrix.small import EXPERTS, small, small_layout

from gemcut.errors import QualityError
from gemcut.export.imatrix import coverage, gate
from gemcut.export.imatrix.starved import shrink, starved_units, unshrink


def test_a_fifth_of_the_mean_is_the_line() -> None:
    assert starved_units(np.array([100, 100, 100, 14, 16])) == ()  # mean 66, line 13.2
    assert starved_units(np.array([100, 100, 100, 13, 16])) == (3,)
    assert starved_units(np.array([0, 0, 0])) == ()
    assert starved_units(np.array([5])) == ()


def test_starved_experts_borrow_the_mean_row() -> None:
    sums = np.array([[800.0, 80.0], [0.0, 0.0], [6.0, 6.0]])
    counts = np.array([100.0, 0.0, 2.0])
    more, seen = shrink(sums, counts, (1, 2), 10)
    mean = np.array([806.0, 86.0]) / 102.0
    np.testing.assert_allclose(more[1] / seen[1], mean)
    np.testing.assert_allclose(more[2] / seen[2], (sums[2] + 10 * mean) / 12)
    np.testing.assert_array_equal(more[0], sums[0])
    assert seen.tolist() == [100, 10, 12]


@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=12).filter(any),
    prior=st.integers(0, 500),
)
def test_what_was_borrowed_can_be_given_back(seed: int, counts: list[int], prior: int) -> None:
    n = np.array(counts, np.float64)
    sums = np.random.default_rng(seed).random((len(n), 5)) * n[:, None]
    units = starved_units(n)
    back, seen = unshrink(*shrink(sums, n, units, prior), units, prior)
    np.testing.assert_allclose(back, sums, rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(seen, n)


def test_coverage_and_gate() -> None:
    fine = coverage(small(counts=(100, 90, 110, 100)), small_layout())
    assert fine.failed == ()
    assert fine.tokens == 1000
    assert fine.missing == ()
    gate(fine)
    poor = coverage(small(counts=(400, 0, 0, 3)), small_layout())
    (one,) = poor.experts
    assert (one.name, one.starved, one.unseen, one.least) == (EXPERTS, (1, 2, 3), (1, 2), 0)
    with pytest.raises(QualityError) as found:
        gate(poor)
    assert EXPERTS in str(found.value)
    assert found.value.exit_code == 5


def test_one_starved_expert_in_five_is_let_through() -> None:
    gate(coverage(small(units=5, counts=(100, 100, 100, 100, 0)), small_layout(units=5)))
    with pytest.raises(QualityError):
        gate(coverage(small(units=5, counts=(100, 100, 100, 0, 0)), small_layout(units=5)))
