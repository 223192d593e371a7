"""From figures per token to rows of the table: chunks, classes, intervals. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemcut.evaluate.interval import Bootstrap
from gemcut.stream.corpus import Corpus
from gemcut.stream.hidden import scored_positions
from gemcut.types import F64, I64, KldRow

ALL = "all"

Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Per scored token: chunk int64 [T] (0 … N−1); nll float64 [M, T], kl float64 [M−1, T], same bool [M−1, T].

    cls: int64 [T], the token's class in `corpus.classes`.
    """

    dtype: str
    chunk: I64
    cls: I64
    nll: F64
    kl: F64
    same: Bools

    def only(self, keep: Bools) -> Measured:
        """These tokens alone; chunks that lost all of theirs are gone."""
        chunk, _ = renumbered(self.chunk[keep])
        return Measured(self.dtype, chunk, self.cls[keep], self.nll[:, keep], self.kl[:, keep], self.same[:, keep])


def chunks_of(corpus: Corpus, chunk_tokens: int | None) -> I64:
    """int64 [T]: the chunk of every scored token. Chunks never span two items."""
    parts, count = [], 0
    for row in corpus.items:
        at = np.arange(len(row.ids) - 1, dtype=np.int64)
        part = count + (np.zeros_like(at) if chunk_tokens is None else at // chunk_tokens)
        parts.append(part)
        count = int(part[-1]) + 1
    return np.concatenate(parts)


def rows_of(classes: Sequence[str], measured: Measured) -> list[tuple[str, I64, I64]]:
    """(name, positions [t], class of each chunk among them [n]) of every class, then of all."""
    firsts = np.flatnonzero(np.diff(measured.chunk, prepend=-1))
    of_chunk = measured.cls[firsts]
    rows = [(name, np.flatnonzero(measured.cls == i), of_chunk[of_chunk == i]) for i, name in enumerate(classes)]
    rows = [row for row in rows if len(row[1])]
    return [*rows, (ALL, np.arange(len(measured.cls), dtype=np.int64), of_chunk)]


def classes_of(corpus: Corpus) -> I64:
    """int64 [T]: the class of every scored token."""
    names = list(corpus.classes)
    per_item = np.array([names.index(row.cls) for row in corpus.items], dtype=np.int64)
    return np.repeat(per_item, np.diff(scored_positions(corpus.items)))


def renumbered(chunk: I64) -> tuple[I64, I64]:
    """Chunks as 0 … n−1 in order, and the tokens of each."""
    _, inverse, counts = np.unique(chunk, return_inverse=True, return_counts=True)
    return inverse.astype(np.int64), counts.astype(np.int64)


def sums(values: F64, chunk: I64) -> F64:
    return np.bincount(chunk, weights=values).astype(np.float64)


def kld_row(name: str, take: I64, strata: I64, measured: Measured, i: int, draw: tuple[int, int]) -> KldRow:
    chunk, tokens = renumbered(measured.chunk[take])
    bootstrap = Bootstrap(strata, *draw)
    kl = measured.kl[i, take]
    first, second = measured.nll[0, take], measured.nll[i + 1, take]
    median, p99 = bootstrap.quantiles(kl, chunk, (0.5, 0.99))
    return KldRow(
        cls=name,
        tokens=int(tokens.sum()),
        mean=bootstrap.ratio(sums(kl, chunk), tokens),
        median=median,
        p99=p99,
        same_top=bootstrap.ratio(sums(measured.same[i, take].astype(np.float64), chunk), tokens),
        ln_ppl_ratio=bootstrap.ratio(sums(second - first, chunk), tokens),
        ppl_base=float(np.exp(first.mean())),
        ppl_candidate=float(np.exp(second.mean())),
    )
