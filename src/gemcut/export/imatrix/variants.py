"""How importances are made of moments. Only proportions inside a row count: every quantiser weighs column by column.

e = E[a²] = a2/n     r = √E[a⁴] = √(a4/n)     w_c = ‖W[:, c]‖²     L1(v)_c = v_c·F/Σ|v|, a mean of 1 in every unit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.errors import UsageError
from gemcut.export.imatrix.starved import shrink, starved_units
from gemcut.records.linears import LinearSums
from gemcut.types import F64

FLOOR = 1e-6  # of a unit's mean: a block of zero importances is a division by zero in several quantisers


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over the rows that entered each unit of a tensor: n [U], a2 = Σ a² and a4 = Σ a⁴ [U, F], float64.

    a1: Σ a, None where the observation did not keep it.
    starved: units that hold `prior` rows of the layer's mean more than they saw.
    """

    n: F64
    a2: F64
    a4: F64
    starved: tuple[int, ...] = ()
    a1: F64 | None = None

    @property
    def inputs(self) -> tuple[F64, F64] | None:
        """μ = a1/n and e − μ² [U, F]; of a unit without rows, 0 and 1."""
        if self.a1 is None:
            return None
        n = np.maximum(self.n, 1.0)[:, None]
        mean = self.a1 / n
        spread = np.maximum(self.a2 / n - mean**2, 0.0)
        return mean, np.where(self.n[:, None] > 0, spread, 1.0)


def moments(sums: LinearSums, splits: Sequence[int], prior: int) -> Moments:
    """The chosen halves of the corpus, added up; starved units shrunk towards their layer's mean (`starved.shrink`)."""
    at = list(splits)
    n, a2, a4 = sums.n[at].sum(0), sums.a2[at].sum(0), sums.a4[at].sum(0)
    starved = starved_units(n) if prior else ()
    a2, _ = shrink(a2, n, starved, prior)
    a1 = None if sums.a1 is None else shrink(sums.a1[at].sum(0), n, starved, prior)[0]
    a4, n = shrink(a4, n, starved, prior)
    return Moments(n, a2, a4, starved, a1)


@dataclass(frozen=True, slots=True)
class Formula:
    """One way to an importance. `of(e, r, w)` for arrays [U, F]; w is None unless `weights`."""

    about: str
    weights: bool
    of: Callable[[F64, F64, F64 | None], F64]


def _l1(v: F64) -> F64:
    total = v.sum(axis=1, keepdims=True)
    out: F64 = np.divide(v * v.shape[1], total, out=np.ones_like(v), where=total > 0)
    return out


def _hybrid(e: F64, r: F64, w: F64 | None) -> F64:
    assert w is not None
    return np.maximum(_l1(e), _l1(w * e))


FORMULAS: Mapping[str, Formula] = {
    "plain": Formula("E[a²], as llama-imatrix", False, lambda e, r, w: e),
    "hybrid": Formula("max(L1(E[a²]), L1(‖W[:, c]‖²·E[a²]))", True, _hybrid),
    "rms4": Formula("√E[a⁴]", False, lambda e, r, w: r),
    "max": Formula("max(L1(E[a²]), L1(√E[a⁴]))", False, lambda e, r, w: np.maximum(_l1(e), _l1(r))),
}


def formula(name: str) -> Formula:
    """By name. UsageError where there is none."""
    try:
        return FORMULAS[name]
    except KeyError:
        raise UsageError("no such variant of importances", got=name, wanted=", ".join((*FORMULAS, "auto"))) from None


def importance(name: str, found: Moments, energy: F64 | None = None) -> F64:
    """float64 [U, F] of one variant, at least FLOOR of its unit's mean; ones for a unit without rows or all of zeros.

    Args:
        energy: w [U, F], where the formula asks for weights.
    """
    n = np.maximum(found.n, 1.0)[:, None]
    s = formula(name).of(found.a2 / n, np.sqrt(found.a4 / n), energy)
    mean = s.mean(axis=1, keepdims=True)
    return np.where(mean > 0, np.maximum(s, FLOOR * mean), 1.0)
