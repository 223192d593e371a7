"""coverage: in how many questions an expert is among the strongest of its layer."""

from __future__ import annotations

import numpy as np

from gemcut.errors import UsageError
from gemcut.score.criterion import Checked, Choice, Criterion, Ranking, Whole, text, whole
from gemcut.score.sums import Sums
from gemcut.types import F64, QUESTION_SUMS


def rank(sums: Sums, params: Checked) -> Ranking:
    """Rank by the number of questions that protect an expert, ties by the pooled score.

        top(q, l)    = the `protect` experts with the largest b[q, l, e], of those routed at all     (b: `of`, "gf")
        cov[l, e]    = Σ_q w[q]·[e in top(q, l)]
        S[l, e]      = cov[l, e] + δ[l]/2 · p[l, e] / max_e p[l, e],   p[l, e] = Σ_q w[q]·b[q, l, e]

    float64 [L, E]; δ[l] is the smallest step between different counts of the layer (1 for whole weights), so that
    the second term orders only equal counts. Within a question equal scores go to the lower expert.

    Source: the card of the 109-expert prune of gemma-4-26B-A4B ("per-question top-16 protection"): the union of the
    questions' top-16 sets, kept by coverage. The published script does something else: it protects the top 16 of the
    pooled score and then ranks by the same pooled score, which protects nothing. The card is implemented here.
    The card's per-question number is ‖·‖₂ over the question's tokens, which depends on how the text was cut into
    calls; Σ g·‖f‖ does not.

    `protect=0` is twice the router's top-k: the card's 16 for Gemma 4's top-8, and in proportion elsewhere.

    Raises:
        UsageError: `protect` is above the number of experts, or a base that is not kept per question.
    """
    of = text(params, "of")
    _, n_layers, experts = sums.shape
    protect = whole(params, "protect") or min(2 * sums.stats.meta.top_k, experts)
    if protect > experts:
        raise UsageError(
            "coverage.protect is too large", got=protect, wanted=f"at most the {experts} experts of a layer"
        )
    key = f"top{protect}({of})"
    if key not in sums.cache:
        sums.cache[key] = _top(sums.by_question(of).reshape(-1, n_layers, experts), protect)
    covered = sums.per_class(sums.cache[key]).sum(axis=0)  # [L·E]
    # Weights that are not whole add up with rounding noise; equal counts must stay equal.
    covered = np.round(covered, 9).reshape(n_layers, experts)
    pooled = sums.per_class(sums.by_question(of)).sum(axis=0).reshape(n_layers, experts)
    values = covered.copy()
    for row in range(n_layers):
        steps = np.diff(np.unique(covered[row]))
        step = min(1.0, float(steps.min())) if len(steps) else 1.0
        largest = float(pooled[row].max())
        if largest > 0:
            values[row] += step / 2 * pooled[row] / largest
    return Ranking(values=values)


def _top(scores: F64, protect: int) -> F64:
    """1.0 where an expert is among its question's strongest in the layer; [Q, L, E] to [Q, L·E]."""
    order = np.argsort(-scores, axis=2, kind="stable")[:, :, :protect]
    top = np.zeros_like(scores)
    np.put_along_axis(top, order, 1.0, axis=2)
    top[scores <= 0] = 0.0
    return top.reshape(len(scores), -1)


CRITERION = Criterion(
    name="coverage",
    about="number of questions that have the expert among their strongest",
    source="model card, gemma-4-A4B 109 experts v3",
    rank=rank,
    params={"protect": Whole(0, 0), "of": Choice("gf", QUESTION_SUMS)},
)
