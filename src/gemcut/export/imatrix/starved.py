"""Experts that the text hardly reached: who they are, what they borrow from the others, and when that is too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.errors import QualityError
from gemcut.export.imatrix.entries import Imatrix, missing_entries
from gemcut.families.gguf import GgufLayout
from gemcut.types import F64, I64

STARVED_SHARE = 0.2  # an expert that saw fewer rows than this share of its layer's mean
PRIOR_TOKENS = 64  # κ


def starved_units(counts: I64 | F64) -> tuple[int, ...]:
    """Units that saw fewer than a fifth of the mean count of their tensor. A tensor of one unit has none."""
    if len(counts) < 2 or not counts.any():
        return ()
    return tuple(int(u) for u in np.flatnonzero(counts < STARVED_SHARE * counts.mean()))


def shrink(sums: F64, counts: F64, units: Sequence[int], prior: int) -> tuple[F64, F64]:
    """Starved units as if they had seen `prior` more rows, each like the layer's mean row:

        Σ'_u = Σ_u + κ·m      n'_u = n_u + κ      m = Σ_v Σ_v / Σ_v n_v      importance Σ'_u / n'_u

    Args:
        sums: float64 [U, F] as they were summed.   counts: float64 [U].   units: those that shrink; the others stay.
    Returns:
        New arrays, float64.
    """
    if not units or not prior:
        return sums, counts
    at = list(units)
    sums, mean = sums.copy(), sums.sum(axis=0) / counts.sum()
    counts = counts.copy()
    sums[at] += prior * mean
    counts[at] += prior
    return sums, counts


def unshrink(sums: F64, counts: F64, units: Sequence[int], prior: int) -> tuple[F64, F64]:
    """What `shrink` was given. With k shrunk units, T = Σ_v Σ'_v and N = Σ_v n_v: T = N·m·(1 + kκ/N), so m is known."""
    total = counts.sum() - len(units) * prior
    if not units or not prior or total <= 0:
        return sums, counts
    at = list(units)
    mean = sums.sum(axis=0) / (total + len(units) * prior)
    sums, counts = sums.copy(), counts.copy()
    counts[at] -= prior
    sums[at] = np.where(counts[at, None] == 0, 0.0, np.maximum(sums[at] - prior * mean, 0.0))
    return sums, counts


# ---------------------------------------------------------------- coverage

MAX_STARVED_SHARE = 0.2  # of a layer's experts; more fail the gate


@dataclass(frozen=True, slots=True)
class TensorCoverage:
    """One tensor of several units: rows that each really saw.

    starved: below a fifth of the mean.   unseen: no row at all; llama-quantize takes ones for those that have no
    borrowed rows either.
    """

    name: str
    units: int
    mean: float
    least: int
    starved: tuple[int, ...]
    unseen: tuple[int, ...]

    @property
    def starved_share(self) -> float:
        return len(self.starved) / self.units


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of a whole file.   tokens: rows that the tensors of one unit saw (least).   missing: tensors without an entry."""

    tokens: int
    tensors: int
    experts: tuple[TensorCoverage, ...]
    missing: tuple[str, ...]

    @property
    def failed(self) -> tuple[TensorCoverage, ...]:
        """Tensors with more starved units than the gate lets through."""
        return tuple(one for one in self.experts if one.starved_share > MAX_STARVED_SHARE)


def coverage(imatrix: Imatrix, layout: GgufLayout | None = None) -> Coverage:
    """Who saw how much. The imatrix has the layout's shapes (`fit`); without one nothing is known to be missing."""
    missing = () if layout is None else missing_entries(imatrix, layout)
    experts, whole = [], []
    for name in imatrix.entries:
        counts = imatrix.tokens(name)
        if len(counts) == 1:
            whole.append(int(counts[0]))
            continue
        experts.append(
            TensorCoverage(
                name=name,
                units=len(counts),
                mean=float(counts.mean()),
                least=int(counts.min()),
                starved=starved_units(counts),
                unseen=tuple(int(u) for u in np.flatnonzero(counts == 0)),
            )
        )
    return Coverage(min(whole, default=0), len(imatrix.entries), tuple(experts), missing)


def gate(found: Coverage) -> None:
    """Refuse text that left too many experts of a layer starved. What was written stays.

    Raises:
        QualityError: more than a fifth of a layer's experts saw less than a fifth of the layer's mean.
    """
    if not found.failed:
        return
    worst = max(found.failed, key=lambda one: one.starved_share)
    raise QualityError(
        f"the text starves experts of {len(found.failed)} tensors",
        where=worst.name,
        got=f"{len(worst.starved)} of {worst.units} below {STARVED_SHARE:.0%} of their mean of {worst.mean:.0f} rows",
        wanted=f"at most {MAX_STARVED_SHARE:.0%}",
        hint="the file is written; broaden the corpus, or merge in an imatrix of other text",
    )
