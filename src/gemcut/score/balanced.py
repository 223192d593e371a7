"""balanced: every class has one vote to share out; a share that rests on few questions counts less."""

from __future__ import annotations

import numpy as np

from gemcut.score.criterion import (
    Checked,
    Choice,
    ClassWeights,
    Criterion,
    Ranking,
    Real,
    class_weights,
    real,
    text,
)
from gemcut.score.sums import Sums, check_class_weights, divide
from gemcut.types import F64, QUESTION_SUMS


def rank(sums: Sums, params: Checked) -> Ranking:
    """Class-balanced shares, shrunk by their own uncertainty, as a mix of mean and maximum over classes.

        p[c, l, e] = b[c, l, e] / Σ_e' b[c, l, e']                       share of the class's work in the layer
        s[c, l, e] = √( n/(n−1) · Σ_{q in c} w[q]²·(b[q, l, e] − p[c, l, e]·B[q, l])² ) / Σ_q w[q]·B[q, l]
        a[c, l, e] = p / (1 + caution · s / p)
        S[l, e]    = (1 − mix) · Σ_c ω[c]·a[c, l, e]  +  mix · max_c C·ω[c]·a[c, l, e],      ω = weights / Σ weights

    b is the base `of` ("gf" = Σ g·‖f‖), B[q, l] = Σ_e b[q, l, e], s the standard error of the ratio p over the n
    questions of the class (linearised; 0 for a class of one question), C the number of classes with a weight.
    float64 [L, E].

    Why it is built so:
      * The sum over tokens, not the mean per routed token, is what the model loses: a rare expert with a large norm
        costs little in all. Shares keep a class with little text from being outvoted (plain sums do not).
      * The mean alone gives up specialists; the maximum alone keeps whoever is lucky in one class. A maximum of noisy
        numbers picks noise, so a share is first divided by (1 + caution × its coefficient of variation): an expert
        that owes its share to one question of thirty falls behind one that is used in all of them. Division instead
        of subtraction keeps every routed expert above those never routed.

    Source: own. The standard error is the usual one of a ratio estimator (Cochran, Sampling Techniques, §2.11).

    Raises:
        UsageError: an unknown class in `weights`, or a base that is not kept per question.
        QualityError: a class has nothing in a layer.
    """
    of, mix = text(params, "of"), real(params, "mix")
    weights = check_class_weights(class_weights(params, "weights"), sums)
    used = weights > 0
    share = sums.share(of, used)
    if caution := real(params, "caution"):
        spread = divide(standard_error(sums, of, share), share)
        share = share / (1 + caution * spread)
    omega = weights / weights.sum()
    per_class = share * omega[:, None, None] * int(used.sum())
    values = (1 - mix) * per_class[used].mean(axis=0) + mix * per_class[used].max(axis=0)
    return Ranking(values=values, per_class=per_class)


def standard_error(sums: Sums, of: str, share: F64) -> F64:
    """The standard error of each share over its class's questions, float64 [C, L, E].

    The square is multiplied out, so that a bootstrap draw costs four weighted sums and no [Q, L, E] temporary.
    """
    n_classes, n_layers, experts = sums.shape
    base = sums.by_question(of)  # [Q, L·E]
    if f"{of}²" not in sums.cache:
        sums.cache[f"{of} total"] = base.reshape(len(base), n_layers, experts).sum(axis=2)  # [Q, L]
        sums.cache[f"{of}²"] = base * base
        sums.cache[f"{of}·total"] = base * np.repeat(sums.cache[f"{of} total"], experts, axis=1)
    totals = sums.cache[f"{of} total"]
    squares = sums.own**2 * sums.times  # [Q]
    square = sums.per_class(sums.cache[f"{of}²"], squares).reshape(sums.shape)
    cross = sums.per_class(sums.cache[f"{of}·total"], squares).reshape(sums.shape)
    total_square = sums.per_class(totals**2, squares)[:, :, None]
    variance = np.maximum(square - 2 * share * cross + share**2 * total_square, 0.0)
    total = sums.per_class(totals)[:, :, None]
    n = np.bincount(sums.class_of, weights=sums.times * (sums.own > 0), minlength=n_classes)[:, None, None]
    small = np.where(n > 1, n / np.maximum(n - 1, 1), 1.0)
    return divide(np.sqrt(variance * small), np.broadcast_to(total, variance.shape))


CRITERION = Criterion(
    name="balanced",
    about="each class shares out one vote; mean and maximum over classes, less where few questions speak for it",
    source="own",
    rank=rank,
    params={
        "of": Choice("gf", QUESTION_SUMS),
        "weights": ClassWeights(),
        "mix": Real(0.5, 0.0, 1.0),
        "caution": Real(1.0, 0.0, 10.0),
    },
)
