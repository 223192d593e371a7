"""Statistics to Scores: every criterion is a re-slice of the stored sums; none runs the model.

A criterion is one file with its formula and one line in CRITERIA. Those of attention heads are in `score.heads`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from gemcut.errors import QualityError, UsageError
from gemcut.score import (
    balanced,
    class_max,
    class_rank,
    coverage,
    ean,
    easy_ep,
    frequency,
    man,
    msan,
    random,
    reap,
    relative,
)
from gemcut.score.criterion import Criterion, Ranking, refuse_flat
from gemcut.score.head_cost import Balance, LayerCost
from gemcut.score.heads import (
    HEAD_CRITERIA,
    HEAD_DEFAULT,
    HeadCriterion,
    balance_of,
    head_criterion_named,
    rank_correlation,
    score_heads,
)
from gemcut.score.sums import Sums
from gemcut.types import F64, Scores, Statistics

log = logging.getLogger(__name__)

CRITERIA: Mapping[str, Criterion] = {
    "random": random.CRITERION,
    "frequency": frequency.CRITERION,
    "ean": ean.CRITERION,
    "reap": reap.CRITERION,
    "relative": relative.CRITERION,
    "man": man.CRITERION,
    "msan": msan.CRITERION,
    "easy_ep": easy_ep.CRITERION,
    "coverage": coverage.CRITERION,
    "class_max": class_max.CRITERION,
    "class_rank": class_rank.CRITERION,
    "balanced": balanced.CRITERION,
}
# the least damage on the demo mixture of experts, beside frequency, class_rank and balanced: docs/bench.md
DEFAULT = "easy_ep"


def criterion_named(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in CRITERIA:
        raise UsageError(f"there is no criterion {name!r}", wanted=", ".join(CRITERIA))
    return CRITERIA[name]


def score(stats: Statistics, criterion: str = DEFAULT, /, **params: object) -> Scores:
    """Rank every expert of every layer.

    Returns:
        Scores with `values` float64 [L, E], and all parameters, defaults included.

    Raises:
        UsageError: unknown criterion or parameter, a class the corpus does not have, or a model without experts.
        QualityError: a layer whose scores are all equal, so that only the numbering would decide, or not finite.
    """
    chosen = criterion_named(criterion)
    checked = chosen.check(params)
    _need_experts(stats)
    _refuse_non_finite(stats)
    ranking = chosen.rank(Sums(stats), checked)
    scores = Scores(
        criterion=criterion,
        params=checked,
        kind="experts",
        layers=stats.meta.layers,
        values=ranking.values,
        model_fingerprint=stats.meta.model_fingerprint,
        statistics_fingerprint=stats.fingerprint,
        corpus_hash=stats.meta.corpus_hash,
        protected=ranking.protected,
        why=ranking.why,
        classes=stats.meta.classes if ranking.per_class is not None else (),
        per_class=ranking.per_class,
    )
    refuse_flat(scores)
    return scores


def score_all(stats: Statistics, names: Sequence[str] = ()) -> tuple[Scores, ...]:
    """Every criterion with its defaults, for comparison; those that this corpus cannot answer are left out."""
    out = []
    for name in names or CRITERIA:
        try:
            out.append(score(stats, name))
        except (QualityError, UsageError) as error:
            log.info("criterion %s is left out: %s", name, error.what)
    return tuple(out)


def resample(stats: Statistics, scores: Scores, draws: int = 200, seed: int = 0) -> F64 | None:
    """The same criterion on resampled questions, float64 [B, L, E]: how much its ranking owes to chance.

    Questions are drawn with replacement within each class (B = `draws`, PCG64 from `seed`); the criterion is
    computed anew from the per-question sums (float32 on disk, float64 here). None where this says nothing: a
    criterion that ignores the questions, or one whose sums are not kept per question.

    Raises:
        UsageError: the scores come from other statistics.
    """
    if scores.statistics_fingerprint != stats.fingerprint:
        raise UsageError(
            "the scores were made from other statistics",
            got=scores.statistics_fingerprint[:12],
            wanted=stats.fingerprint[:12],
        )
    chosen = criterion_named(scores.criterion)
    if not chosen.from_questions or draws < 1 or not stats.meta.questions:
        return None
    rng = np.random.default_rng(seed)
    whole = Sums(stats)
    out = np.empty((draws, *scores.values.shape), np.float64)
    try:
        for b in range(draws):
            out[b] = chosen.rank(whole.draw(rng), scores.params).values
    except (QualityError, UsageError) as error:
        log.warning("no keep probabilities for %s: %s", scores.criterion, error.what)
        return None
    return out


def _need_experts(stats: Statistics) -> None:
    if not stats.meta.layers:
        raise UsageError(
            "this model has no experts to score", where=stats.meta.model_name, hint="gemcut plan heads works on it"
        )


def _refuse_non_finite(stats: Statistics) -> None:
    """A NaN count would pass for "never routed" and a NaN norm for the largest: neither reaches a criterion."""
    for kind, sums in (("class", stats.by_class), ("question", stats.by_question)):
        for name, array in sums.items():
            if not np.isfinite(array).all():
                which, row, expert = (int(v) for v in np.argwhere(~np.isfinite(array))[0])
                raise QualityError(
                    f"the statistics are not finite: {name!r} per {kind}",
                    where=f"{kind} {which}, layer {stats.meta.layers[row]}, expert {expert}",
                    got=float(array[which, row, expert]),
                    hint="observe again: a non-finite statistic must never be ranked",
                )


__all__ = [
    "CRITERIA",
    "DEFAULT",
    "HEAD_CRITERIA",
    "HEAD_DEFAULT",
    "Balance",
    "Criterion",
    "HeadCriterion",
    "LayerCost",
    "Ranking",
    "balance_of",
    "criterion_named",
    "head_criterion_named",
    "rank_correlation",
    "resample",
    "score",
    "score_all",
    "score_heads",
]
