"""Means over tokens and their standard errors over items."""

from __future__ import annotations

import numpy as np

from gemcut.ablate.summary import ratio


def test_equal_weights_give_the_standard_error_of_a_mean() -> None:
    sums = np.random.default_rng(0).normal(size=(7, 2, 3))
    mean, stderr = ratio(sums, np.full(7, 4.0))
    assert stderr is not None
    np.testing.assert_allclose(mean, sums.mean(0) / 4)
    np.testing.assert_allclose(stderr, sums.std(0, ddof=1) / 4 / np.sqrt(7))


def test_the_error_covers_what_resampling_shows() -> None:
    """Items of very different lengths: the linearised error agrees with a bootstrap over items."""
    rng = np.random.default_rng(1)
    weights = rng.integers(5, 200, 60).astype(np.float64)
    sums = (0.3 * weights + rng.normal(size=60) * np.sqrt(weights))[:, None, None]
    _, stderr = ratio(sums, weights)
    assert stderr is not None
    draws = rng.integers(0, 60, (4000, 60))
    resampled = sums[draws, 0, 0].sum(1) / weights[draws].sum(1)
    assert abs(stderr[0, 0] / resampled.std() - 1) < 0.1
