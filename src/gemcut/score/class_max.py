"""class_max: an expert stays if any class needs it ("v4", max over normalised classes)."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Choice, ClassWeights, Criterion, Ranking, class_weights, text
from gemcut.score.sums import BASES, Sums, check_class_weights


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = max_c b[c, l, e] / mean_e' b[c, l, e'], over the classes that weigh more than 0.

    b [C, L, E] is the base `of` ("gf" = Σ g·‖f‖). float64 [L, E], 1 = an average expert of its best class. A class
    may be scaled by any factor without changing anything, so weights other than 0 and 1 would have no defined unit
    here: they multiply the normalised score.

    Source: the card of the 98-expert v4 prune of gemma-4-26B-A4B ("max over normalised classes"), and its tool's
    b = 2·‖w·f‖ + tokens. That sum adds a norm to a count: its balance depends on the corpus size. Here the base is
    one quantity; `of=n` and `of=gf` are its two parts. The tool's "protect the top 16" of the same score is a no-op
    and is not implemented.

    Raises:
        UsageError: an unknown class in `weights`, or a weighted class without tokens.
        QualityError: a class has nothing in a layer.
    """
    weights = check_class_weights(class_weights(params, "weights"), sums)
    used = weights > 0
    per_class = sums.share(text(params, "of"), used) * sums.experts * weights[:, None, None]
    return Ranking(values=per_class[used].max(axis=0), per_class=per_class)


CRITERION = Criterion(
    name="class_max",
    about="each class's score over its mean, then the largest over classes",
    source="model card, gemma-4-A4B 98 experts v4",
    rank=rank,
    params={"of": Choice("gf", BASES), "weights": ClassWeights()},
)
