"""What removing query heads costs a layer once the others have been refitted, from one inverse of its Gram matrix.

Axes: d = heads·D columns of o_proj, one head D consecutive columns; U heads; H hidden; p removed units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.errors import QualityError, UsageError
from gemcut.score.kv_balance import Balance, Rule, lowest
from gemcut.types import F64, I64

RIDGE_REL = 1e-2
_BLOCK = 512
_ROWS = 2048
# Costs that differ by less than this share of the layer's whole output are equal: the lower head number decides.
_TIE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class _Removed:
    """The layer after the units P were removed and the others refitted: W′ its weights, H = (G + λI)⁻¹.

    Shapes, u columns per unit, n units: gain [n] (inf for removed ones), s and n [p·u, p·u], z and left [p·u, d],
    h and v [n, u, u].
    """

    units: tuple[int, ...]
    cost: float  # E(P)
    gain: F64  # E(P ∪ {j}) − E(P)
    s: F64  # (H_PP)⁻¹
    z: F64  # s·H_P,: — what each removed column is predicted by
    left: F64  # W_Pᵀ W′; s·left = Λᵀ W′ with Λ = W_P s
    n: F64  # Λᵀ Λ
    h: F64  # diagonal blocks of the kept columns' inverse Gram
    v: F64  # diagonal blocks of W′ᵀW′


class LayerCost:
    """Exact costs of removing heads of one layer.

    The refit of the kept columns K that is nearest to the original is the minimum over W′ with W′_P = 0 of

        J(W′) = Σ_t w_t ‖W x_t − W′ x_t‖² + λ‖W − W′‖²,    λ = ridge_rel · tr(G) / d,   G = Σ_t w_t x_t x_tᵀ

    and with G_λ = G + λI it is

        E(P) = tr(W_P S_P W_Pᵀ),    S_P = G_PP − G_PK G_KK⁻¹ G_KP = ((G_λ⁻¹)_PP)⁻¹      (G_λ's blocks)

    so every set of heads costs one small inverse. W enters only as A = WᵀW. The weights are kept as they are where
    the token weights w_t make J the damage behind the branch's RMSNorm; its γ then scales the rows of W.

    Shapes: gram [d, d], weight [H, d], gamma [H]; float64 throughout. Memory: two more [d, d] than the arguments.
    Units: squared norm of the branch's output behind its norm, summed over tokens.

    Raises:
        UsageError: shapes that do not belong together, or a negative ridge.
        QualityError: a value that is not finite, or a Gram matrix that has no inverse.

    Source: Optimal Brain Surgeon for groups (Hassibi & Stork 1993; SlimGPT, arXiv:2412.18110); local search over the
    set as in OSSCAR, arXiv:2403.12983.
    """

    def __init__(
        self,
        gram: F64,
        weight: F64,
        heads: int,
        head_dim: int,
        ridge_rel: float = RIDGE_REL,
        gamma: F64 | None = None,
    ) -> None:
        d = heads * head_dim
        if gram.shape != (d, d) or weight.ndim != 2 or weight.shape[1] != d:
            raise UsageError(
                "the Gram matrix and the weight belong to another number of heads",
                got=f"gram {list(gram.shape)}, weight {list(weight.shape)}",
                wanted=f"{heads} heads of {head_dim}: gram [{d}, {d}], weight [H, {d}]",
            )
        if gamma is not None and gamma.shape != (len(weight),):
            raise UsageError("the norm is of another width", got=list(gamma.shape), wanted=f"[{len(weight)}]")
        if not ridge_rel >= 0:
            raise UsageError("a ridge is not negative", got=ridge_rel, wanted="0 or more")
        self.heads, self.head_dim = heads, head_dim
        scaled = weight if gamma is None else weight * gamma[:, None]
        self._a: F64 = scaled.T @ scaled  # [d, d]
        trace = float(np.trace(gram))
        if not np.isfinite(trace) or not np.isfinite(self._a.trace()):
            raise QualityError("the Gram matrix or the weight is not finite", hint="observe again")
        self.ridge = ridge_rel * trace / d
        self._pairs = self._pair_costs(gram)
        self._inverse = invert(gram, self.ridge)
        self.total = float(self._pairs.sum())
        self._tie = _TIE * max(self.total, 0.0)

    def _pair_costs(self, gram: F64) -> F64:
        """tr(W_h G_hk W_kᵀ) of G_λ for all pairs of heads, [U, U]."""
        u, dim = self.heads, self.head_dim
        out = np.empty((u, u), np.float64)
        for h in range(u):
            rows = slice(h * dim, (h + 1) * dim)
            out[h] = (self._a[rows] * gram[rows]).reshape(dim, u, dim).sum(axis=(0, 2))
            out[h, h] += self.ridge * float(np.trace(self._a[rows, rows]))
        return out

    # ------------------------------------------------------------ costs

    def cost(self, chosen: Iterable[int]) -> float:
        """E(P): what is lost for good when these heads go and the others are refitted."""
        heads = self._checked(chosen)
        if not heads:
            return 0.0
        columns = self._columns(heads, self.head_dim)
        block = np.ix_(columns, columns)
        # Σ A∘S = tr(A·S), both symmetric
        return float((self._a[block] * np.linalg.inv(self._inverse[block])).sum())

    def unhealed(self, chosen: Iterable[int]) -> float:
        """tr(W_P G_PP W_Pᵀ) of G_λ: what is lost when these heads go and nothing is refitted; never below `cost`."""
        heads = list(self._checked(chosen))
        return float(self._pairs[np.ix_(heads, heads)].sum())

    def relative(self, chosen: Iterable[int]) -> float:
        """E(P) as a share of tr(W G Wᵀ), the cost of losing every head; 0 to 1."""
        return self.cost(chosen) / self.total if self.total > 0 else 0.0

    def singles(self) -> F64:
        """E({h}) of every head alone, [U]."""
        return self._remove((), self.head_dim).gain

    def _checked(self, chosen: Iterable[int]) -> tuple[int, ...]:
        heads = tuple(sorted(set(chosen)))
        if heads and (heads[0] < 0 or heads[-1] >= self.heads):
            raise UsageError("there is no such head", got=list(heads), wanted=f"0 to {self.heads - 1}")
        return heads

    # ------------------------------------------------------------ the best set

    def greedy(self, count: int, balance: Balance) -> tuple[int, ...]:
        """`count` heads, one unit after the other, each the cheapest beside those already gone; in that order.

        Raises:
            UsageError: a count that the balance does not allow, or a balance of another number of heads.
        """
        self._check_balance(balance, count)
        units = balance.units
        width = len(units[0]) * self.head_dim
        gone: list[int] = []
        heads: list[int] = []
        while len(heads) < count:
            gain = self._remove(tuple(sorted(gone)), width).gain
            unit = self._cheapest(
                (float(gain[j]), j) for j in range(len(units)) if balance.fits(heads, units[j], count)
            )
            gone.append(unit)
            heads.extend(units[unit])
        return tuple(heads)

    def swap(self, chosen: Sequence[int], balance: Balance) -> tuple[int, ...]:
        """Exchange one unit for another while that lowers E(P), the best exchange first; ascending heads.

        Deterministic: of exchanges that gain the same, the one with the lowest numbers.

        Raises:
            UsageError: see `greedy`.
        """
        self._check_balance(balance, len(set(chosen)))
        units = self._descend(_units_of(chosen, balance), balance, set())
        return tuple(h for unit in units for h in balance.units[unit])

    def _descend(self, units: tuple[int, ...], balance: Balance, seen: set[tuple[int, ...]]) -> tuple[int, ...]:
        """Exchanges until none gains; stops, too, at a set from which an earlier search went on."""
        width = len(balance.units[0]) * self.head_dim
        before, cost = units, np.inf
        while units not in seen:
            now = self._remove(units, width)
            if not now.cost < cost:  # what was predicted, computed anew: rounding must not go round in circles
                return before
            seen.add(units)
            found = self._best_exchange(now, balance)
            if found is None:
                break
            before, cost, units = units, now.cost, found
        return units

    def best(self, count: int, balance: Balance) -> tuple[int, ...]:
        """The cheapest set that was found, in the order in which its heads would go one by one.

        Swaps start from three sets: the greedy one, the heads that are cheapest alone after a refit, and those that are
        cheapest alone without one. So the result is never worse than any of them.
        """
        self._check_balance(balance, count)
        alone = (self.singles(), np.diag(self._pairs))
        starts = [self.greedy(count, balance), *(lowest(values, count, balance) for values in alone)]
        seen: set[tuple[int, ...]] = set()
        found = [self._descend(_units_of(start, balance), balance, seen) for start in starts]
        units = balance.units
        left = set(min(found, key=lambda one: self.cost(h for unit in one for h in units[unit])))
        heads: list[int] = []
        while left:
            unit = self._cheapest((self.cost([*heads, *units[j]]), j) for j in sorted(left))
            left.remove(unit)
            heads.extend(units[unit])
        return tuple(heads)

    def _check_balance(self, balance: Balance, count: int) -> None:
        if balance.heads != self.heads:
            raise UsageError("the balance is of another layer", got=balance.heads, wanted=f"{self.heads} heads")
        balance.require(count)

    def _cheapest(self, found: Iterable[tuple[float, int]]) -> int:
        """The unit of the lowest cost; of equal ones the first."""
        best, at = np.inf, -1
        for value, unit in found:
            if at < 0 or value < best - self._tie:
                best, at = value, unit
        return at

    def _best_exchange(self, now: _Removed, balance: Balance) -> tuple[int, ...] | None:
        """The units after the exchange that lowers the cost most, None where none does."""
        units = balance.units
        count = sum(len(units[i]) for i in now.units)
        best, after = now.cost - self._tie, None
        for i, leaving in enumerate(now.units):
            rest = [unit for unit in now.units if unit != leaving]
            heads = [h for unit in rest for h in units[unit]]
            legal = [j for j in range(len(units)) if j not in now.units and balance.fits(heads, units[j], count)]
            for j, value in zip(legal, _exchanged(now, i, legal), strict=True):
                if value < best - self._tie:
                    best, after = value, tuple(sorted([*rest, j]))
        return after

    def _remove(self, units: tuple[int, ...], u: int) -> _Removed:
        """Everything about the layer without these units (u columns each); `units` ascending.

        W′ = W − Λ H_P,:,   Λ = W_P s,   s = (H_PP)⁻¹      (W′_P = 0; the kept columns are the refit)
        E(P ∪ {j}) − E(P) = tr(W′_j ((H − H_:,P s H_P,:)_jj)⁻¹ W′_jᵀ)
        """
        a, inverse = self._a, self._inverse
        n = self.heads * self.head_dim // u
        columns = self._columns(units, u)
        block = np.ix_(columns, columns)
        s: F64 = np.linalg.inv(inverse[block]).astype(np.float64, copy=False)
        rows, a_rows = inverse[columns], a[columns]  # [p·u, d]
        z: F64 = s @ rows
        az: F64 = a[block] @ z
        h, v = np.zeros((n, u, u), np.float64), np.zeros((n, u, u), np.float64)
        gain = np.full(n, np.inf)
        for j in range(n):
            if j in units:
                continue
            at = slice(j * u, (j + 1) * u)
            cross = a_rows[:, at].T @ z[:, at]
            v[j] = a[at, at] - cross - cross.T + z[:, at].T @ az[:, at]
            h[j] = inverse[at, at] - rows[:, at].T @ z[:, at]
            gain[j] = max(_trace_of_quotient(h[j], v[j]), 0.0)
        cost = float((a[block] * s).sum())
        return _Removed(units, cost, gain, s=s, z=z, left=a_rows - az, n=s @ a[block] @ s, h=h, v=v)

    @staticmethod
    def _columns(units: Sequence[int], u: int) -> I64:
        return (np.array(units, np.int64)[:, None] * u + np.arange(u)).ravel()


def _exchanged(now: _Removed, i: int, others: Sequence[int]) -> list[float]:
    """E(P ∖ {i} ∪ {j}) for the i-th removed unit and each of `others`.

    Undoing the removal of i is a rank-u change of everything `now` holds, with r = (s_ii)⁻¹, Z = z_ij, Y = r Z:

        E(P ∖ {i}) = E(P) − tr(n_ii r)
        h_j ← h_j + Zᵀ Y,    v_j ← v_j + tᵀ_ij Y + Yᵀ t_ij + Yᵀ n_ii Y,    t = Λᵀ W′
    """
    u = now.h.shape[1]
    here = slice(i * u, (i + 1) * u)
    r = np.linalg.inv(now.s[here, here])
    n = now.n[here, here]
    t = now.s[here] @ now.left  # [u, d]
    without = now.cost - float((n * r.T).sum())
    out = []
    for j in others:
        at = slice(j * u, (j + 1) * u)
        z = now.z[here, at]
        y = r @ z
        cross = t[:, at].T @ y
        out.append(without + _trace_of_quotient(now.h[j] + z.T @ y, now.v[j] + cross + cross.T + y.T @ n @ y))
    return out


def _trace_of_quotient(h: F64, v: F64) -> float:
    """tr(h⁻¹ v)."""
    return float(np.trace(np.linalg.solve(h, v)))


def _units_of(heads: Iterable[int], balance: Balance) -> tuple[int, ...]:
    """The units that make up these heads, ascending."""
    size = len(balance.units[0])
    units = tuple(sorted({h // size for h in heads}))
    if sorted(h for unit in units for h in balance.units[unit]) != sorted(set(heads)):
        raise UsageError("the heads are no whole KV groups", got=sorted(set(heads)), wanted=f"groups of {size}")
    return units


def invert(gram: F64, ridge: float) -> F64:
    """(G + ridge·I)⁻¹ of a symmetric positive definite G, float64 [d, d].

    Gauss-Jordan by blocks, in place on one copy: 2·d³ operations, and next to nothing beside the result in memory. A
    library inverse holds two more matrices, which for 16384 columns are 4 GiB.

    Raises:
        QualityError: not positive definite.
    """
    out = np.array(gram, np.float64, order="C")
    d = len(out)
    out.flat[:: d + 1] += ridge
    for first in range(0, d, _BLOCK):
        here = slice(first, min(first + _BLOCK, d))
        pivot = (out[here, here] + out[here, here].T) / 2
        try:
            np.linalg.cholesky(pivot)
        except np.linalg.LinAlgError:
            raise QualityError(
                "the Gram matrix has no inverse",
                where=f"columns {here.start} to {here.stop - 1}",
                got=f"ridge {ridge:g}",
                hint="observe more tokens, or choose a larger ridge",
            ) from None
        small: F64 = np.linalg.inv(pivot).astype(np.float64, copy=False)
        row = small @ out[here]
        row[:, here] = small
        column = out[:, here].copy()
        column[here] = 0
        out[:, here] = 0
        for low in range(0, d, _ROWS):
            part = slice(low, low + _ROWS)
            out[part] -= column[part] @ row
        out[here] = row
    return out


__all__ = ["RIDGE_REL", "Balance", "LayerCost", "Rule", "invert", "lowest"]
