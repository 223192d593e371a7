"""The heal's algebra against explicit least squares on the stacked rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gemcut.errors import QualityError
from gemcut.surgery.heal.solve import Moments, choose_ridge, refit

T, H, D = 300, 12, 20
KEEP = torch.tensor([0, 1, 2, 5, 6, 7, 8, 11, 12, 13, 14, 17])
DROP = torch.tensor([i for i in range(D) if i not in KEEP.tolist()])
EPS = 1e-6


def data(seed: int = 0, rows: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X [T, D] with correlated columns and rows of very different size, W [H, D], Y = X Wᵀ."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(rows, D, generator=g, dtype=torch.float64) @ mix
    x = x * torch.exp(torch.randn(rows, 1, generator=g, dtype=torch.float64))
    w = torch.randn(H, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return x, w, x @ w.t()


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    """Weighted as the norm behind o_proj divides."""
    out = Moments.zeros(y.shape[1], x.shape[1])
    root = (y.square().mean(-1) + EPS).rsqrt()
    out.add(x, root, y * root[:, None])
    return out


def explicit(x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, lam: float) -> np.ndarray:
    """argmin Σ w‖W x − y‖² + λ‖W − start‖² as one numpy least-squares problem with 2·T + K rows."""
    root = 1 / np.sqrt((y.numpy() ** 2).mean(-1, keepdims=True) + EPS)
    top = np.concatenate([x.numpy() * root, math.sqrt(lam) * np.eye(x.shape[1])])
    goal = np.concatenate([y.numpy() * root, math.sqrt(lam) * start.numpy().T])
    return np.linalg.lstsq(top, goal, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_refit_is_least_squares(ridge: float) -> None:
    """Inputs that have drifted from those that made the targets, as behind cut layers."""
    x, w, y = data()
    drifted = x[:, KEEP] + 0.3 * torch.randn(T, len(KEEP), generator=torch.Generator().manual_seed(3)).double()
    start = w[:, KEEP]
    m = moments(drifted, y)
    got = refit(m, start, ridge, "here")
    assert got.lam == pytest.approx(ridge * float(m.g.trace()) / len(KEEP), rel=1e-14)
    np.testing.assert_allclose(got.weight.numpy(), explicit(drifted, y, start, got.lam), rtol=0, atol=1e-9)
    given = torch.linalg.solve((m.g + got.lam * torch.eye(len(KEEP)).double()).t(), (m.c + got.lam * start).t()).t()
    torch.testing.assert_close(got.weight, given, rtol=0, atol=1e-9)


def test_a_large_ridge_gives_the_weights_that_are_there_never_zero() -> None:
    x, w, y = data()
    start = w[:, KEEP]
    got = refit(moments(x[:, KEEP], y), start, 1e12, "here")
    assert float((got.weight - start).abs().max()) < 1e-10
    assert float(start.abs().max()) > 1


def test_the_local_formula_is_the_same_fit() -> None:
    """W'_K = W_K + W_P G_PK (G_KK + λI)⁻¹ from the whole Gram matrix."""
    x, w, y = data()
    gram = moments(x, y).g
    local = Moments.of_gram(gram, w, KEEP, T)
    streamed = moments(x[:, KEEP], y)
    for name in ("g", "c"):
        torch.testing.assert_close(getattr(local, name), getattr(streamed, name), rtol=1e-10, atol=1e-10)
    assert local.tt == pytest.approx(streamed.tt, rel=1e-12)
    a, b = refit(local, w[:, KEEP], 1e-2, "here"), refit(streamed, w[:, KEEP], 1e-2, "here")
    inverse = torch.linalg.inv(gram[KEEP][:, KEEP] + a.lam * torch.eye(len(KEEP), dtype=torch.float64))
    formula = w[:, KEEP] + w[:, DROP] @ gram[DROP][:, KEEP] @ inverse
    torch.testing.assert_close(a.weight, formula, rtol=0, atol=1e-9)
    torch.testing.assert_close(b.weight, formula, rtol=0, atol=1e-9)


def test_the_residual_is_that_of_the_rows() -> None:
    x, w, y = data()
    m, other = moments(x[:, KEEP], y), w[:, KEEP] + 0.1
    weight = 1 / (y.square().mean(-1) + EPS)
    error = (weight * (x[:, KEEP] @ other.t() - y).square().sum(-1)).sum() / (weight * y.square().sum(-1)).sum()
    assert m.residual(other) == pytest.approx(math.sqrt(float(error)), rel=1e-10)
    assert m.residual(torch.zeros_like(other)) == pytest.approx(1.0)
    assert moments(x, y).residual(w) < 1e-6
    assert m.n == T


def test_moments_add_up() -> None:
    x, _, y = data()
    whole = moments(x[:, KEEP], y)
    parts = moments(x[:100, KEEP], y[:100])
    parts.absorb(moments(x[100:, KEEP], y[100:]))
    torch.testing.assert_close(parts.g, whole.g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.c, whole.c, rtol=1e-12, atol=1e-12)
    assert (parts.n, parts.tt) == (T, pytest.approx(whole.tt, rel=1e-12))


def test_every_token_weighs_the_same_whatever_its_size() -> None:
    """The norm behind o_proj divides by the row's size: a token a thousand times larger must not decide the fit."""
    x, w, y = data()
    scale = torch.ones(T, 1, dtype=torch.float64)
    scale[::50] = 1000.0
    loud = refit(moments(x[:, KEEP] * scale, y * scale), w[:, KEEP], 1e-2, "here").weight
    plain = refit(moments(x[:, KEEP], y), w[:, KEEP], 1e-2, "here").weight
    torch.testing.assert_close(loud, plain, rtol=1e-4, atol=1e-4)


def test_the_best_ridge_on_other_rows_is_chosen() -> None:
    few, w, y = data(1, rows=16)
    noise = 20 * torch.randn(16, H, generator=torch.Generator().manual_seed(2)).double()
    x2, _, y2 = data(2)
    ridges = (1e-9, 1e-2, 1e3)
    inner = moments(x2[:, KEEP], y2)
    best, tried = choose_ridge(moments(few[:, KEEP], y + noise), inner.residual, w[:, KEEP], ridges, "here")
    assert set(tried) == set(ridges)
    assert tried[best] == min(tried.values())
    assert best != 1e-9  # noise, followed exactly, is the worst of them


def test_equal_ridges_move_the_weights_least() -> None:
    _, w, _ = data()
    fit = Moments(torch.eye(len(KEEP)).double(), w[:, KEEP].clone(), 1.0, 5)
    assert choose_ridge(fit, lambda _: 0.5, w[:, KEEP], (1e-3, 1.0, 1e-1), "here")[0] == 1.0


def test_condition() -> None:
    """Against all eigenvalues; the two ends of the second matrix are close to their neighbours."""
    x, _, y = data()
    for g in (moments(x[:, KEEP], y).g, torch.diag(torch.linspace(1.0, 9.0, 12, dtype=torch.float64))):
        for ridge in (1e-3, 1.0):
            found = refit(Moments(g, torch.zeros(H, len(g)).double()), torch.zeros(H, len(g)).double(), ridge, "here")
            values = torch.linalg.eigvalsh(g) + found.lam
            assert found.condition == pytest.approx(float(values[-1] / values[0]), rel=0.02)


def test_no_unique_solution_is_an_error_that_names_the_layer() -> None:
    none = Moments.zeros(H, 4)
    with pytest.raises(QualityError, match="no unique solution") as caught:
        refit(none, torch.zeros(H, 4, dtype=torch.float64), 1e-2, "layer 7")
    assert "layer 7" in str(caught.value)
