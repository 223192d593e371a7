"""The algebra of the heal: moments, ridge regression towards the weights that are there, residuals. float64 only.

K kept columns of the concatenated head outputs, H hidden. For one layer, inputs X̂ [T, K] from the cut model, targets
Y [T, H] from the dense one, token weights Ω = diag(w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from gemcut.errors import QualityError

_CHUNK_ROWS = 1024  # rows in float64 at a time


@dataclass(eq=False)
class Moments:
    """Sums over tokens, all float64:

        g = Σ_t w_t x̂_t x̂_tᵀ [K, K]    c = Σ_t w_t y_t x̂_tᵀ [H, K]    yy = Σ_t w_t ‖y_t‖²    n = Σ_t 1

    They are everything that the fit and its residual need: Σ_t w_t ‖W x̂_t − y_t‖² = yy − 2 tr(W cᵀ) + tr(W g Wᵀ).
    """

    g: torch.Tensor
    c: torch.Tensor
    yy: float = 0.0
    n: int = 0

    @classmethod
    def zeros(cls, hidden: int, kept: int, device: torch.device | None = None) -> Self:
        """Nothing seen yet."""
        return cls(
            torch.zeros((kept, kept), dtype=torch.float64, device=device),
            torch.zeros((hidden, kept), dtype=torch.float64, device=device),
        )

    @classmethod
    def of_gram(cls, gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, n: int) -> Self:
        """From a dense layer's own Gram matrix G [d, d], where X̂ = X and Y = X Wᵀ.

            g = G_KK    c = W G_{:,K}    yy = tr(W G Wᵀ)

        Args:
            weight: W [H, d]; kept: int64 [K].
        """
        image = weight @ gram  # [H, d]
        return cls(gram[kept][:, kept], image[:, kept].contiguous(), float((image * weight).sum()), n)

    def add(self, x: torch.Tensor, y: torch.Tensor, eps: float) -> None:
        """Rows x [n, K] and y [n, H]. w_t = 1 / (mean(y_t²) + eps): the RMSNorm behind o_proj divides by exactly this.

        The norm makes only relative size matter; unweighted, a few attention-sink tokens would be all that is fitted.
        """
        for first in range(0, len(x), _CHUNK_ROWS):
            target = y[first : first + _CHUNK_ROWS].to(self.g.device, torch.float64)
            root = (target.square().mean(-1, keepdim=True) + eps).rsqrt()  # √w [n, 1]
            rows = x[first : first + _CHUNK_ROWS].to(self.g.device, torch.float64) * root
            target = target * root
            self.g.addmm_(rows.t(), rows)
            self.c.addmm_(target.t(), rows)
            self.yy += float(target.square().sum())
            self.n += len(rows)

    def absorb(self, other: Moments) -> None:
        """Add another part's sums, in place: on a large model each takes gigabytes."""
        self.g.add_(other.g)
        self.c.add_(other.c)
        self.yy += other.yy
        self.n += other.n

    def finite(self) -> bool:
        """Whether every sum is a number."""
        return bool(torch.isfinite(self.g).all() and torch.isfinite(self.c).all()) and math.isfinite(self.yy)

    def residual(self, weight: torch.Tensor) -> float:
        """sqrt(Σ w‖Ŷ − Y‖² / Σ w‖Y‖²) of Ŷ = X̂ Wᵀ, weight [H, K]. 0 is perfect; all-zero weights give 1.

        From the moments in float64, so that relative errors below about 1e-7 read as rounding.
        """
        wide = weight.to(self.g.device, torch.float64)
        error = self.yy + float((wide @ self.g).sub_(self.c, alpha=2).mul_(wide).sum())
        return math.sqrt(max(error, 0.0) / self.yy) if self.yy > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """weight float64 [H, K] and the absolute ridge λ that gave it."""

    weight: torch.Tensor
    lam: float


def refit(moments: Moments, start: torch.Tensor, ridge: float, where: str) -> Refit:
    """Ridge regression towards `start`, never towards zero.

        λ = ridge · tr(g)/|K|
        W' = argmin Σ_t w_t‖W x̂_t − y_t‖² + λ‖W − W_K‖²
           = (c + λ W_K)(g + λI)⁻¹ = W_K + (c − W_K g)(g + λI)⁻¹

    The last form is computed (Cholesky, float64): λ → ∞ gives W_K, and where nothing is to be gained nothing moves.
    With X̂ = X and Y = X Wᵀ it is W_K + W_P G_PK (G_KK + λI)⁻¹.

    Args:
        start: W_K float64 [H, K], the weights that are there.
        where: for the message.
    Raises:
        QualityError: g + λI is not positive definite.
    """
    lam = ridge * float(moments.g.trace()) / len(moments.g)
    lower = _cholesky(moments.g, lam, where)
    left = torch.addmm(moments.c, start, moments.g, alpha=-1)  # [H, K]
    return Refit(torch.cholesky_solve(left.t(), lower).t().add_(start), lam)


def _cholesky(g: torch.Tensor, lam: float, where: str) -> torch.Tensor:
    shifted = g.clone()  # symmetric but for rounding; only its lower triangle is read
    shifted.diagonal().add_(lam)
    lower: torch.Tensor
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        raise QualityError(
            "the heal's system of equations has no unique solution",
            where=where,
            got=f"λ = {lam:.3g}, not positive definite at column {int(info)} of {len(g)}",
            hint="raise the ridge, or give more calibration text",
        )
    return lower


def condition(moments: Moments, lam: float) -> float:
    """λ_max/λ_min of g + λI, from its eigenvalues in float64; 1 is perfect, 1e12 leaves four digits."""
    values = torch.linalg.eigvalsh(moments.g)
    return (float(values[-1]) + lam) / max(float(values[0]) + lam, torch.finfo(torch.float64).tiny)


def choose_ridge(
    fit: Moments, inner: Moments, start: torch.Tensor, ridges: Sequence[float], where: str
) -> tuple[float, dict[float, float]]:
    """The ridge with the smallest residual on `inner` of the weights fitted on `fit`, and every ridge's residual.

    Of equals the largest ridge wins: it moves the weights least.
    """
    residuals = {ridge: inner.residual(refit(fit, start, ridge, where).weight) for ridge in ridges}
    return min(residuals, key=lambda ridge: (residuals[ridge], -ridge)), residuals
