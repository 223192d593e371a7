"""What every criterion reads: the statistics' sums under the questions' weights, and their resamples."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import QualityError, UsageError
from gemcut.types import EXPERT_SUMS, F64, I64, QUESTION_SUMS, Statistics

# A sum, or the same sum per routed token.
BASES: tuple[str, ...] = (*EXPERT_SUMS, *(f"{name}/n" for name in EXPERT_SUMS if name != "n"))


class Sums:
    """The expert sums of a corpus whose question q counts `weights[q]` times.

    Class sums on disk are raw. They are used as they are when every weight is 1; otherwise the sums are made again
    from the per-question arrays, `Σ_{q in c} w[q]·x[q]`, accumulated in float64. A bootstrap draw is only another
    set of weights, so every criterion can be resampled without knowing it.

    Shapes: `by_class` [C, L, E], `pooled` [L, E], `by_question` [Q, L·E], `weights` [Q]; questions in the
    order of `order`.
    """

    def __init__(self, stats: Statistics, times: F64 | None = None, cache: dict[str, F64] | None = None) -> None:
        meta = stats.meta
        self.stats = stats
        self.classes = meta.classes
        self.layers = meta.layers
        self.experts = meta.experts
        position = {name: i for i, name in enumerate(meta.classes)}
        class_of = np.array([position[q.cls] for q in meta.questions], np.int64)
        # Questions lie sorted by class in every array here, so that a class is a slice.
        self.order: I64 = np.argsort(class_of, kind="stable")
        self.class_of: I64 = class_of[self.order]
        self.bounds: I64 = np.searchsorted(self.class_of, np.arange(len(meta.classes) + 1))
        # How often a question was drawn, and what it weighs each time.
        self.times: F64 = np.ones(len(meta.questions), np.float64) if times is None else times
        self.own: F64 = np.array([meta.questions[q].weight for q in self.order], np.float64)
        self.weights: F64 = self.own * self.times
        self.raw = bool((self.weights == 1).all())
        # Shared between the draws of one bootstrap: what does not depend on the weights.
        self.cache: dict[str, F64] = {} if cache is None else cache

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.classes), len(self.layers), self.experts

    def draw(self, rng: np.random.Generator) -> Sums:
        """Questions drawn with replacement, class by class: a class is never lost by chance."""
        times = np.zeros(len(self.class_of), np.float64)
        for low, high in pairwise(self.bounds):
            if high > low:
                times[low:high] = rng.multinomial(high - low, np.full(high - low, 1 / (high - low)))
        return Sums(self.stats, times, self.cache)

    def by_question(self, name: str) -> F64:
        """One sum per question, float64 [Q, L·E].

        Raises:
            UsageError: this sum is not kept per question.
        """
        if name not in QUESTION_SUMS:
            raise UsageError(
                f"{name!r} is not kept per question, so question weights other than 1 cannot be honoured",
                got=name,
                wanted=", ".join(QUESTION_SUMS),
                hint="choose another base with of=…, or observe a corpus whose weights are all 1",
            )
        if name not in self.cache:
            array = self.stats.by_question[name]
            self.cache[name] = array.reshape(len(array), -1)[self.order].astype(np.float64)
        return self.cache[name]

    def per_class(self, values: F64, weights: F64 | None = None) -> F64:
        """Σ_{q in c} weights[q]·values[q], float64 [Q, X] to [C, X]; the questions' weights if none are given.

        einsum and not a matrix product: these are too small for BLAS threads, which on a busy machine made this eight
        times slower, and one thread gives the same bits everywhere.
        """
        weights = self.weights if weights is None else weights
        out = np.zeros((len(self.classes), values.shape[1]), np.float64)
        for c, (low, high) in enumerate(pairwise(self.bounds)):
            np.einsum("q,qx->x", weights[low:high], values[low:high], out=out[c])
        return out

    def by_class(self, name: str) -> F64:
        """One sum per class under the questions' weights, float64 [C, L, E]."""
        if self.raw:
            return self.stats.by_class[name]
        return self.per_class(self.by_question(name)).reshape(self.shape)

    def base(self, of: str) -> F64:
        """A base score per class, float64 [C, L, E]: a sum ("gf"), or a sum per routed token ("gf/n").

        An expert that no token of the class was routed to has 0 in both forms.
        """
        name, _, per_token = of.partition("/")
        total = self.by_class(name)
        return divide(total, self.by_class("n")) if per_token else total

    def pooled(self, of: str) -> F64:
        """A base score over all classes, float64 [L, E]."""
        name, _, per_token = of.partition("/")
        total = self.by_class(name).sum(axis=0)
        return divide(total, self.by_class("n").sum(axis=0)) if per_token else total

    def tokens(self) -> F64:
        """Weighted tokens per class, float64 [C]."""
        counts = np.array([self.stats.meta.questions[q].tokens for q in self.order], np.float64)
        return self.per_class(counts[:, None])[:, 0]

    def share(self, of: str, used: NDArray[np.bool_]) -> F64:
        """A base score as each expert's share of its class and layer, float64 [C, L, E].

        `used` bool [C]: classes to look at; the others get zeros. Sums to 1 over experts where used.

        Raises:
            QualityError: a used class has nothing in a layer, so it has no shares.
        """
        base = self.base(of)
        total = base.sum(axis=2, keepdims=True)
        empty = np.argwhere(~(total[:, :, 0] > 0) & used[:, None])
        if len(empty):
            c, row = (int(v) for v in empty[0])
            raise QualityError(
                f"class {self.classes[c]!r} has no {of!r} to share out",
                where=f"layer {self.layers[row]}",
                got=float(total[c, row, 0]),
                wanted="more than 0",
                hint="observe more text of this class, or leave the class out",
            )
        shares = np.zeros_like(base)
        np.divide(base, total, out=shares, where=used[:, None, None])
        return shares


def divide(total: F64, count: F64) -> F64:
    """total / count, and 0 where nothing was counted: an expert that was never routed goes first."""
    out = np.zeros_like(total)
    np.divide(total, count, out=out, where=count > 0)
    return out


def rank01(values: F64) -> F64:
    """Ranks along the last axis, 0 for the lowest and 1 for the highest; equal values share their mean rank.

    Shapes: [..., E] to [..., E]. Sharing makes the ranks independent of the experts' order, which argsort twice is not.
    """
    flat = values.reshape(-1, values.shape[-1])
    out = np.empty_like(flat)
    for row, line in enumerate(flat):
        ordered = np.sort(line)
        below = np.searchsorted(ordered, line, side="left")
        upto = np.searchsorted(ordered, line, side="right")
        out[row] = (below + upto - 1) / 2
    last = max(values.shape[-1] - 1, 1)
    scaled: F64 = (out / last).reshape(values.shape)
    return scaled


def check_class_weights(weights: Mapping[str, float], sums: Sums) -> F64:
    """One weight per class, float64 [C]; classes that are not named weigh 1.

    Raises:
        UsageError: an unknown class, no class that weighs anything, or a weighted class without a token.
    """
    unknown = sorted(set(weights) - set(sums.classes))
    if unknown:
        raise UsageError(
            f"the corpus has no class {unknown[0]!r}",
            where="weights",
            got=", ".join(map(repr, unknown)),
            wanted=f"some of {', '.join(sums.classes)}",
        )
    out = np.array([weights.get(name, 1.0) for name in sums.classes], np.float64)
    if not (out > 0).any():
        raise UsageError("no class weighs anything", where="weights", wanted="at least one weight above 0")
    for name, weight, tokens in zip(sums.classes, out, sums.tokens(), strict=True):
        if weight > 0 and not tokens > 0:
            raise UsageError(
                f"class {name!r} has no tokens in this corpus",
                where="weights",
                hint=f"observe text of this class, or pass weights.{name}=0",
            )
    return out
