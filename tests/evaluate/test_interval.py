"""Intervals: right on known cases, wide enough for clustered tokens, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.errors import UsageError
from gemcut.evaluate.interval import Bootstrap


def one_class(n: int, *, seed: int = 0, resamples: int = 1000) -> Bootstrap:
    return Bootstrap(np.zeros(n, dtype=np.int64), seed, resamples)


def test_ratio_weighs_chunks_by_their_tokens() -> None:
    got = one_class(2).ratio(np.array([10.0, 0.0]), np.array([1, 9]))
    assert got.value == 1.0  # not the mean of 10 and 0
    assert got.n == 2
    assert (got.low, got.high) == (0.0, 10.0)


def test_ratio_interval_has_the_width_of_the_textbook() -> None:
    """Equal chunk sizes: the standard error of the mean is sd / sqrt(n)."""
    rng = np.random.default_rng(1)
    x = rng.normal(3.0, 1.0, 400)
    got = one_class(400, resamples=4000).ratio(x * 10, np.full(400, 10))
    half = 1.96 * x.std() / np.sqrt(400)
    assert got.value == pytest.approx(x.mean())
    assert got.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_where_the_tokenwise_one_does_not() -> None:
    """Chunks with a shared level: 95 % intervals must hold about 95 % of the time."""
    rng = np.random.default_rng(2)
    chunks, tokens, hits, naive_hits, trials = 60, 50, 0, 0, 120
    for trial in range(trials):
        x = rng.normal(0.0, 1.0, (chunks, 1)) + 0.3 * rng.normal(size=(chunks, tokens))
        got = one_class(chunks, seed=trial, resamples=300).ratio(x.sum(1), np.full(chunks, tokens))
        hits += got.low <= 0.0 <= got.high
        naive_hits += abs(x.mean()) <= 1.96 * x.std() / np.sqrt(x.size)
    assert hits / trials > 0.88
    assert naive_hits / trials < 0.5


def test_quantiles_are_values_that_occur_and_agree_with_numpy() -> None:
    rng = np.random.default_rng(3)
    values = rng.exponential(size=997)
    chunk = rng.integers(0, 20, 997)
    got = one_class(20).quantiles(values, chunk, [0.5, 0.99, 1.0])
    assert [g.value for g in got] == list(np.quantile(values, [0.5, 0.99, 1.0], method="inverted_cdf"))
    for g in got:
        assert g.low <= g.value <= g.high
        assert g.n == 20


def test_quantile_resamples_equal_repeating_the_tokens() -> None:
    """One resample by hand: repeat each token as often as its chunk was drawn."""
    rng = np.random.default_rng(4)
    values, chunk = rng.normal(size=200), rng.integers(0, 7, 200)
    bootstrap = one_class(7, seed=9, resamples=40)
    drawn = []
    for block in bootstrap._weights():
        for weights in block:
            assert weights.sum() == 7
            drawn.append(np.quantile(np.repeat(values, weights[chunk]), 0.9, method="inverted_cdf"))
    got = bootstrap.quantiles(values, chunk, [0.9])[0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (got.low, got.high) == (min(low, got.value), max(high, got.value))


def test_strata_are_kept_and_lonely_classes_drawn_together() -> None:
    strata = np.array([0, 0, 0, 1, 1, 2, 3])
    for block in Bootstrap(strata, 0, 200)._weights():
        assert (block[:, strata == 0].sum(1) == 3).all()
        assert (block[:, strata == 1].sum(1) == 2).all()
        assert (block[:, 5:].sum(1) == 2).all()
        assert block[:, 5].std() > 0
    for block in Bootstrap(np.array([0, 0, 0, 1]), 0, 200)._weights():
        assert (block.sum(1) == 4).all()
        assert block[:, 3].std() > 0  # a single lonely chunk joins the largest class


def test_stratified_interval_leaves_out_the_difference_between_classes() -> None:
    sums = np.repeat([0.0, 100.0], 30) + np.tile([-1.0, 1.0], 30)
    ones = np.ones(60)
    inside = Bootstrap(np.repeat([0, 1], 30), 0).ratio(sums, ones)
    across = one_class(60).ratio(sums, ones)
    assert inside.high - inside.low < 1.0 < across.high - across.low


def test_the_seed_decides() -> None:
    x = np.random.default_rng(5).normal(size=50)
    ones = np.ones(50)
    first = one_class(50, seed=1).ratio(x, ones)
    assert one_class(50, seed=1).ratio(x, ones) == first
    assert one_class(50, seed=2).ratio(x, ones) != first


def test_zeros_have_a_zero_interval_and_one_chunk_says_n() -> None:
    zero = one_class(9).ratio(np.zeros(9), np.full(9, 3))
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)
    alone = one_class(1).ratio(np.array([6.0]), np.array([3]))
    assert (alone.value, alone.low, alone.high, alone.n) == (2.0, 2.0, 2.0, 1)
    assert one_class(1).quantiles(np.array([1.0, 5.0]), np.array([0, 0]), [0.5])[0].value == 1.0


def test_many_chunks_stay_within_bounded_memory() -> None:
    import tracemalloc

    n = 20_000
    x = np.random.default_rng(6).normal(size=n)
    tracemalloc.start()
    got = one_class(n, resamples=500).ratio(x, np.ones(n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6  # the whole weight matrix in float64 would be 80 MB, its draws and counts 240 MB more
    assert got.low < got.value < got.high


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    q=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_point_quantile_is_numpys(values: list[float], q: float, seed: int) -> None:
    array = np.array(values)
    chunk = np.random.default_rng(seed).integers(0, 3, len(values))
    got = one_class(3, resamples=5).quantiles(array, np.minimum(chunk, 2), [q])[0] if len(set(chunk)) == 3 else None
    if got is not None:
        assert got.value == np.quantile(array, q, method="inverted_cdf")
        assert got.low <= got.value <= got.high


def test_bad_calls_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one chunk"):
        one_class(0)
    with pytest.raises(UsageError, match="positive count"):
        one_class(2).ratio(np.ones(2), np.array([1, 0]))
    with pytest.raises(UsageError, match="positive count"):
        one_class(2).ratio(np.ones(3), np.ones(3))
    with pytest.raises(UsageError, match="every token"):
        one_class(2).quantiles(np.ones(3), np.zeros(2, dtype=np.int64), [0.5])
    with pytest.raises(UsageError, match="resamples"):
        Bootstrap(np.zeros(3, dtype=np.int64), 0, 1)
