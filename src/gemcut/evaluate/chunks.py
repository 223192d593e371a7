"""What several candidates cost on the same chunks: means, paired differences and ratios with intervals."""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.evaluate.interval import RESAMPLES, Bootstrap
from gemcut.types import F64, I64, Estimate


@dataclass(frozen=True, slots=True, eq=False)
class KldChunks:
    """KL(base ‖ candidate) of every chunk, so that candidates can be compared on the same resamples.

    strata, tokens: int64 [N], class and scored tokens of each chunk.   kl: float64 [M, N], nats, summed over tokens.
    """

    strata: I64
    tokens: I64
    kl: F64
    seed: int = 0
    resamples: int = RESAMPLES

    def mean(self, i: int) -> Estimate:
        """Nats per token of one candidate."""
        return self._ratio(self.kl[i], self.tokens)

    def difference(self, i: int, j: int) -> Estimate:
        """Nats per token that candidate i has above candidate j, paired: both in every resample."""
        return self._ratio(self.kl[i] - self.kl[j], self.tokens)

    def ratio(self, i: int, j: int) -> Estimate:
        """KL of candidate i as a share of that of candidate j, paired.

        Raises:
            UsageError: candidate j equals the base in some chunk.
        """
        return self._ratio(self.kl[i], self.kl[j])

    def _ratio(self, sums: F64, counts: F64 | I64) -> Estimate:
        return Bootstrap(self.strata, self.seed, self.resamples).ratio(sums, counts)
