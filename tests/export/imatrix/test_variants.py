from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.errors import UsageError
from gemcut.export.imatrix.variants import FLOOR, FORMULAS, Moments, importance, moments
from gemcut.records.linears import LinearSums


def found(seed: int = 0, units: int = 2, columns: int = 6, rows: int = 50) -> tuple[Moments, np.ndarray]:
    a = np.random.default_rng(seed).standard_normal((units, rows, columns)) * np.arange(1, columns + 1)
    n = np.full(units, float(rows))
    return Moments(n, (a**2).sum(1), (a**4).sum(1)), a


def test_formulas() -> None:
    have, a = found()
    e, r = (a**2).mean(1), np.sqrt((a**4).mean(1))
    w = np.random.default_rng(1).random(e.shape)

    def l1(v: np.ndarray) -> np.ndarray:
        return v / v.mean(axis=1, keepdims=True)

    np.testing.assert_allclose(importance("plain", have), e)
    np.testing.assert_allclose(importance("rms4", have), r)
    np.testing.assert_allclose(importance("max", have), np.maximum(l1(e), l1(r)))
    np.testing.assert_allclose(importance("hybrid", have, w), np.maximum(l1(e), l1(w * e)))
    # the closed form: a boost where a column's weights are above the e-weighted mean, nothing elsewhere
    mean = (w * e).sum(1, keepdims=True) / e.sum(1, keepdims=True)
    np.testing.assert_allclose(importance("hybrid", have, w), l1(e) * np.maximum(1, w / mean))


@given(st.sampled_from(sorted(FORMULAS)), st.integers(0, 100), st.booleans())
def test_every_variant_is_positive_and_finite(name: str, seed: int, silent: bool) -> None:
    have, _ = found(seed)
    if silent:  # an expert that no row reached, and columns that are always 0
        have.n[0], have.a2[0], have.a4[0] = 0, 0, 0
        have.a2[1, :3], have.a4[1, :3] = 0, 0
    s = importance(name, have, np.random.default_rng(seed).random(have.a2.shape))
    assert np.isfinite(s).all()
    assert (s >= FLOOR * s.mean(1, keepdims=True) * 0.999).all()
    if silent:
        np.testing.assert_array_equal(s[0], 1)


def test_halves_add_up_and_starved_units_shrink() -> None:
    rng = np.random.default_rng(0)
    n = np.array([[100.0, 1, 90], [80, 2, 95]])
    sums = LinearSums(n, rng.random((2, 3, 4)) * n[..., None], rng.random((2, 3, 4)), np.ones((3, 4), np.float32), True)
    whole = moments(sums, (0, 1), 0)
    np.testing.assert_array_equal(whole.n, [180, 3, 185])
    np.testing.assert_array_equal(whole.a2, sums.a2.sum(0))
    lean = moments(sums, (0, 1), 16)
    assert lean.starved == (1,)
    np.testing.assert_array_equal(lean.n, [180, 19, 185])
    for key in ("a2", "a4"):
        total = getattr(whole, key)
        np.testing.assert_allclose(getattr(lean, key)[1], total[1] + 16 * total.sum(0) / 368)
        np.testing.assert_array_equal(getattr(lean, key)[[0, 2]], total[[0, 2]])
    np.testing.assert_array_equal(moments(sums, (1,), 0).n, n[1])


def test_unknown_variant() -> None:
    with pytest.raises(UsageError, match="no such variant"):
        importance("best", found()[0])
