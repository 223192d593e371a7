"""Intervals from a bootstrap over chunks.

Tokens of one text are not independent: standard errors that treat them so were up to 14 times too small. The unit that
is resampled is therefore the chunk (a corpus item, or a run of tokens of one), inside its class, because the mix of
classes is chosen and not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import UsageError
from gemcut.types import F64, I64, Estimate

RESAMPLES = 1000
# Weights of one block of resamples: about 16 MB of int32.
_BLOCK_ELEMENTS = 4 << 20

Weights: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Bootstrap:
    """The same resamples for every statistic of a table row, so that its columns can be compared.

    strata: int64 [N], the class of each chunk. Chunks are drawn with replacement inside their stratum, as many as it
        has; classes with a single chunk are drawn together, since alone they would never vary.
    """

    strata: I64
    seed: int
    resamples: int = RESAMPLES
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.strata.ndim != 1 or len(self.strata) == 0:
            raise UsageError("a bootstrap needs at least one chunk", got=f"strata of shape {self.strata.shape}")
        if self.resamples < 2 or not 0 < self.level < 1:
            raise UsageError("a bootstrap needs resamples >= 2 and 0 < level < 1", got=(self.resamples, self.level))

    @property
    def n(self) -> int:
        return len(self.strata)

    def ratio(self, sums: F64, counts: F64 | I64) -> Estimate:
        """Ratio of sums with its percentile interval.

            value = Σ_i sums[i] / Σ_i counts[i];   resample b: Σ_i w[b,i]·sums[i] / Σ_i w[b,i]·counts[i]

        Args:
            sums, counts: [N] per chunk; counts above 0 (tokens, so that long chunks count by their length).
        Returns:
            Estimate with n = N chunks. For N = 1 nothing can be resampled: low = high = value, and n says so.
        Raises:
            UsageError: another length than the strata, or a chunk without tokens.
        Source:
            Davison & Hinkley, Bootstrap Methods and their Application (1997), §3.8 and §5.3; float64 throughout.
        """
        sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        if sums.shape != self.strata.shape or counts.shape != self.strata.shape or not (counts > 0).all():
            raise UsageError("every chunk needs a sum and a positive count", got=(sums.shape, counts.shape))
        drawn = np.concatenate([(w @ sums) / (w @ counts) for w in self._weights()])
        return self._estimate(float(sums.sum() / counts.sum()), drawn)

    def quantiles(self, values: F64, chunk: I64, levels: Sequence[float]) -> list[Estimate]:
        """Quantiles over tokens with percentile intervals from resampled chunks.

            value_q = min{v : #{t : values[t] ≤ v} ≥ q·T}   (inverted CDF: a value that occurred, no interpolation)
            resample b: the same with token t counted w[b, chunk[t]] times

        Args:
            values: [T] one per token; chunk: [T] its chunk, 0 … N−1; levels: q in (0, 1].
        Returns:
            One Estimate per level. Memory is O(T): tokens are sorted once, each resample is one cumulative sum.
        """
        if values.shape != chunk.shape or values.ndim != 1 or len(values) == 0:
            raise UsageError("every token needs a value and a chunk", got=(values.shape, chunk.shape))
        order = np.argsort(values, kind="stable")
        values, chunk = np.asarray(values, dtype=np.float64)[order], chunk[order]
        q = np.asarray(levels, dtype=np.float64)
        point = values[_rank(q, len(values))]
        drawn = np.empty((self.resamples, len(q)))
        row = 0
        for block in self._weights():
            for weights in block:
                total = np.cumsum(weights[chunk], dtype=np.int64)
                # the first token whose cumulative count exceeds the wanted rank
                drawn[row] = values[np.searchsorted(total, _rank(q, int(total[-1])), side="right")]
                row += 1
        return [self._estimate(float(point[i]), drawn[:, i]) for i in range(len(q))]

    def _weights(self) -> Iterator[Weights]:
        """Blocks [b, N] of how often each chunk is drawn; the same sequence at every call."""
        rng = np.random.default_rng(self.seed)
        groups = self._groups()
        rows = max(1, _BLOCK_ELEMENTS // self.n)
        for start in range(0, self.resamples, rows):
            b = min(rows, self.resamples - start)
            weights = np.zeros((b, self.n), dtype=np.int32)
            for group in groups:
                size = len(group)
                draws = rng.integers(0, size, size=(b, size)) + np.arange(b)[:, None] * size
                weights[:, group] = np.bincount(draws.ravel(), minlength=b * size).reshape(b, size)
            yield weights

    def _groups(self) -> list[I64]:
        names, counts = np.unique(self.strata, return_counts=True)
        groups = [np.flatnonzero(self.strata == name) for name in names[counts > 1]]
        single = np.flatnonzero(np.isin(self.strata, names[counts == 1]))
        if len(single) == 1 and groups:  # one lonely chunk joins the largest class
            largest = max(range(len(groups)), key=lambda i: len(groups[i]))
            groups[largest] = np.concatenate([groups[largest], single])
        elif len(single):
            groups.append(single)
        return groups

    def _estimate(self, value: float, drawn: F64) -> Estimate:
        tail = (1 - self.level) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        # a skewed statistic of few chunks can fall outside its own percentile interval
        return Estimate(value, min(float(low), value), max(float(high), value), self.n)


def _rank(q: F64, total: int) -> I64:
    """0-based rank of each level among `total` sorted values: ceil(q·total) − 1, safe against rounding."""
    return np.clip(np.ceil(q * total * (1 - 1e-12)).astype(np.int64) - 1, 0, total - 1)
