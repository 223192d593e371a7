"""From numbers per item to the importance of heads, with standard errors and classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.stream.corpus import Corpus
from gemcut.types import F64, HeadImportance, ImportanceMethod


def ratio(sums: F64, weights: F64) -> tuple[F64, F64 | None]:
    """m = Σ_q s_q / Σ_q w_q with its standard error over items.

        stderr = √(Q/(Q−1) · Σ_q (s_q − m·w_q)²) / Σ_q w_q

    Args:
        sums: float64 [Q, L, U].   weights: float64 [Q].
    Returns:
        m [L, U] and stderr [L, U], None for a single item. Float64 throughout.
    Source:
        The linearised variance of a ratio (Cochran, Sampling Techniques, 1977, §6.3); with equal weights it is the
        standard error of a mean.
    """
    total = float(weights.sum())
    mean: F64 = sums.sum(axis=0) / total
    q = len(weights)
    if q < 2:
        return mean, None
    rest = sums - mean[None] * weights[:, None, None]
    stderr: F64 = np.sqrt((rest**2).sum(axis=0) * q / (q - 1)) / total
    return mean, stderr


def summarise(
    method: ImportanceMethod,
    checkpoint: Checkpoint,
    corpus: Corpus,
    *,
    dtype: str,
    layers: Sequence[int],
    sums: F64,
    weights: F64,
) -> HeadImportance:
    """Importance pooled over all items and within each class: `ratio` of the same sums [Q, L, U] and weights [Q].

    Raises:
        QualityError: a value is not finite; names layer and head.
    """
    values, stderr = ratio(sums, weights)
    cls = np.array([corpus.classes.index(row.cls) for row in corpus.items])
    per_class = np.stack([ratio(sums[cls == c], weights[cls == c])[0] for c in range(len(corpus.classes))])
    return HeadImportance(
        method=method,
        layers=tuple(layers),
        values=values,
        stderr=stderr,
        classes=corpus.classes,
        per_class=per_class,
        model_fingerprint=checkpoint.fingerprint,
        corpus_hash=corpus.hash,
        template_hash=corpus.template_hash,
        dtype=dtype,
        tokens=corpus.scored_tokens,
        items=len(corpus.items),
    )
