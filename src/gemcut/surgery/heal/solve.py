"""The algebra of the heal: moments, ridge regression towards the weights that are there, residuals. float64 only.

K kept columns of the concatenated head outputs, H hidden. For one layer, inputs X̂ [T, K] from the cut model, weighted
by √w_t, and targets t_t [T, H]: what the layer should give after that weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from gemcut.errors import QualityError

CHUNK_ROWS = 1024  # rows in float64 at a time
_STEPS = 1000  # of an iteration that is not there yet


@dataclass(eq=False)
class Moments:
    """Sums over tokens, all float64:

        g = Σ_t w_t x̂_t x̂_tᵀ [K, K]    c = Σ_t √w_t t_t x̂_tᵀ [H, K]    tt = Σ_t ‖t_t‖²    n = Σ_t 1

    They are everything that the fit and its residual need: Σ_t ‖√w_t W x̂_t − t_t‖² = tt − 2 tr(W cᵀ) + tr(W g Wᵀ).
    """

    g: torch.Tensor
    c: torch.Tensor
    tt: float = 0.0
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
        """From a dense layer's own Gram matrix G [d, d], already weighted, where X̂ = X and t = √w W x.

            g = G_KK    c = W G_{:,K}    tt = tr(W G Wᵀ)

        Args:
            weight: W [H, d]; kept: int64 [K].
        """
        image = weight @ gram  # [H, d]
        return cls(gram[kept][:, kept], image[:, kept].contiguous(), float((image * weight).sum()), n)

    def add(self, x: torch.Tensor, root: torch.Tensor, target: torch.Tensor) -> None:
        """Rows x [n, K], √w [n] and t [n, H]."""
        for first in range(0, len(x), CHUNK_ROWS):
            at = slice(first, first + CHUNK_ROWS)
            goal = target[at].to(self.g.device, torch.float64)
            rows = x[at].to(self.g.device, torch.float64) * root[at, None].to(self.g.device, torch.float64)
            self.g.addmm_(rows.t(), rows)
            self.c.addmm_(goal.t(), rows)
            self.tt += float(goal.square().sum())
            self.n += len(rows)

    def absorb(self, other: Moments) -> None:
        """Add another part's sums, in place: on a large model each takes gigabytes."""
        self.g.add_(other.g)
        self.c.add_(other.c)
        self.tt += other.tt
        self.n += other.n

    def finite(self) -> bool:
        """Whether every sum is a number."""
        return bool(torch.isfinite(self.g).all() and torch.isfinite(self.c).all()) and math.isfinite(self.tt)

    def residual(self, weight: torch.Tensor) -> float:
        """sqrt(Σ ‖√w W x̂ − t‖² / Σ ‖t‖²) of weights [H, K]. 0 is perfect; all-zero weights give 1.

        From the moments in float64, so that relative errors below about 1e-7 read as rounding.
        """
        error = self.tt
        for first in range(0, len(weight), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            wide = weight[rows].to(self.g.device, torch.float64)
            error += float((wide @ self.g).sub_(self.c[rows], alpha=2).mul_(wide).sum())
        return math.sqrt(max(error, 0.0) / self.tt) if self.tt > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """weight float64 [H, K], the absolute ridge λ that gave it, and λ_max/λ_min of g + λI to about 1 %."""

    weight: torch.Tensor
    lam: float
    condition: float


def refit(moments: Moments, start: torch.Tensor, ridge: float, where: str) -> Refit:
    """Ridge regression towards `start`, never towards zero.

        λ = ridge · tr(g)/|K|
        W' = argmin Σ_t ‖√w_t W x̂_t − t_t‖² + λ‖W − W_K‖²
           = (c + λ W_K)(g + λI)⁻¹ = W_K + (c − W_K g)(g + λI)⁻¹

    The last form is computed (Cholesky, float64): λ → ∞ gives W_K, and where nothing is to be gained nothing moves.
    With X̂ = X and t = √w W x it is W_K + W_P G_PK (G_KK + λI)⁻¹. Beside the moments, memory for one more matrix
    [K, K] and the result: at 16384 columns every copy is 2 GiB.

    Args:
        start: W_K float64 [H, K], the weights that are there.
        where: for the message.
    Raises:
        QualityError: g + λI is not positive definite.
    """
    lam = ridge * float(moments.g.trace()) / len(moments.g)
    lower = _cholesky(moments.g, lam, where)
    weight = start.clone()
    for first in range(0, len(start), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        left = torch.addmm(moments.c[rows], start[rows], moments.g, alpha=-1)
        weight[rows] += _over(left, lower)
    return Refit(weight, lam, _condition(moments.g, lam, lower))


def _cholesky(g: torch.Tensor, lam: float, where: str) -> torch.Tensor:
    shifted = g.clone()  # symmetric but for rounding; only its lower triangle is read
    shifted.diagonal().add_(lam)
    wanted, lower = torch.empty((), dtype=torch.int32, device=g.device), shifted.t()
    _, info = torch.linalg.cholesky_ex(lower, out=(lower, wanted))  # columns first, as LAPACK has it: in place
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        raise QualityError(
            "the heal's system of equations has no unique solution",
            where=where,
            got=f"λ = {lam:.3g}, not positive definite at column {int(info)} of {len(g)}",
            hint="raise the ridge, or give more calibration text",
        )
    return lower


def _over(rows: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """rows (L Lᵀ)⁻¹, [n, K]. Two triangular solves: cholesky_solve would copy L first."""
    half = torch.linalg.solve_triangular(lower.t(), rows, upper=True, left=False)
    out: torch.Tensor = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return out


def _condition(g: torch.Tensor, lam: float, lower: torch.Tensor) -> float:
    """λ_max/λ_min of g + λI; 1 is perfect, 1e12 leaves four digits.

    By iteration, of the matrix and of its inverse, until both stand to 1e-4: all eigenvalues would take longer than
    the fit itself.
    """
    largest = _largest(lambda v: (v @ g).add_(v, alpha=lam), g)
    return largest * _largest(lambda v: _over(v, lower), g)


def _largest(apply: Callable[[torch.Tensor], torch.Tensor], g: torch.Tensor) -> float:
    """The largest eigenvalue of a symmetric positive matrix by power iteration."""
    v = torch.randn(1, len(g), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(g.device)
    found = 0.0
    for _ in range(_STEPS):
        v = v / v.norm()
        image = apply(v)
        before, found = found, float((image * v).sum())
        if abs(found - before) <= 1e-4 * abs(found):
            break
        v = image
    return found


def choose_ridge(
    fit: Moments, inner: Callable[[torch.Tensor], float], start: torch.Tensor, ridges: Sequence[float], where: str
) -> tuple[float, dict[float, float]]:
    """The ridge with the smallest residual of the weights fitted on `fit`, and every ridge's residual.

    Of equals the largest ridge wins: it moves the weights least. `inner` measures weights on text of its own.
    """
    residuals = {ridge: inner(refit(fit, start, ridge, where).weight) for ridge in ridges}
    return min(residuals, key=lambda ridge: (residuals[ridge], -ridge)), residuals
