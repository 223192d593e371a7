"""Every criterion on numbers that can be checked in the head."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.score.synthetic_stats import hand_statistics, make_statistics, with_weights

from gemcut.errors import QualityError, UsageError
from gemcut.score import CRITERIA, resample, score, score_all
from gemcut.score.class_rank import floors
from gemcut.score.sums import Sums, rank01
from gemcut.types import Statistics

# Two questions of "a", one of "b"; one layer, four experts; expert 3 is never routed.
GF = [[[6.0, 2.0, 0.0, 0.0]], [[2.0, 0.0, 4.0, 0.0]], [[0.0, 1.0, 3.0, 0.0]]]
N = [[[2.0, 1.0, 0.0, 0.0]], [[2.0, 0.0, 1.0, 0.0]], [[0.0, 1.0, 3.0, 0.0]]]


@pytest.fixture
def stats() -> Statistics:
    return hand_statistics(GF, ["a", "a", "b"], N)


def values(stats: Statistics, name: str, **params: object) -> list[float]:
    return score(stats, name, **params).values[0].tolist()


@pytest.mark.parametrize(
    ("name", "params", "wanted"),
    [
        ("frequency", {}, [4, 2, 4, 0]),
        ("ean", {}, [16, 6, 14, 0]),  # f = 2·gf
        ("ean", {"form": "mean"}, [4, 3, 3.5, 0]),
        ("reap", {}, [8 / 4, 3 / 2, 7 / 4, 0]),
        ("man", {}, [4, 3, 3.5, 0]),
        # f² = f²/n per question: 12²/2 + 4²/2 = 80; 4²/1 + 2²/1 = 20; 8²/1 + 6²/3 = 76; over n = 4, 2, 4
        ("msan", {}, [20, 10, 19, 0]),
        ("easy_ep", {}, [0.8, 0.3, 0.7, 0]),
        ("relative", {}, [0.5, 0.375, 0.4375, 0]),
        ("relative", {"form": "sum"}, [2, 0.75, 1.75, 0]),
    ],
)
def test_pooled_criteria(stats: Statistics, name: str, params: dict[str, object], wanted: list[float]) -> None:
    assert values(stats, name, **params) == pytest.approx(wanted, rel=1e-6)


def test_coverage_counts_questions_and_breaks_ties_by_the_pooled_score(stats: Statistics) -> None:
    # Strongest of each question: 0, 2, 2. Pooled: 8, 3, 7, 0. Counts 1, 0, 2, 0; the tie term is below half a step.
    assert values(stats, "coverage", protect=1) == pytest.approx([1 + 0.5, 0.5 * 3 / 8, 2 + 0.5 * 7 / 8, 0])
    # Strongest two: {0, 1}, {0, 2}, {1, 2}: all tie at 2, and 3 is routed by nobody.
    assert values(stats, "coverage", protect=2) == pytest.approx([2.5, 2 + 1.5 / 8, 2 + 3.5 / 8, 0])


def test_coverage_weighs_questions(stats: Statistics) -> None:
    weighted = with_weights(stats, [3.0, 1.0, 0.5])
    got = values(weighted, "coverage", protect=1)
    # counts 3, 0, 1.5, 0; pooled 3·6 + 2 = 20, 6.5, 4 + 1.5 = 5.5
    assert got == pytest.approx([3 + 0.5, 0.5 * 6.5 / 20, 1.5 + 0.5 * 5.5 / 20, 0])


def test_coverage_never_protects_an_expert_that_a_question_did_not_route(stats: Statistics) -> None:
    assert values(stats, "coverage", protect=4)[3] == 0
    with pytest.raises(UsageError, match="too large"):
        score(stats, "coverage", protect=5)


def test_coverage_protects_twice_top_k_by_default() -> None:
    stats = make_statistics(np.random.default_rng(0), E=16, k=3)
    np.testing.assert_array_equal(score(stats, "coverage").values, score(stats, "coverage", protect=6).values)


def test_class_max_divides_by_the_class_mean(stats: Statistics) -> None:
    # a: 8, 2, 4, 0 with mean 3.5; b: 0, 1, 3, 0 with mean 1
    assert values(stats, "class_max") == pytest.approx([8 / 3.5, 1, 3, 0])
    assert values(stats, "class_max", weights={"b": 0}) == pytest.approx([8 / 3.5, 2 / 3.5, 4 / 3.5, 0])
    assert values(stats, "class_max", of="n") == pytest.approx([4 / 1.5, 1, 3, 0])


def test_rank01_shares_ties() -> None:
    assert rank01(np.array([[5.0, 1.0, 1.0, 9.0, 9.0]])).tolist() == [[0.5, 0.125, 0.125, 0.875, 0.875]]


def test_class_rank_weights_breadth_and_combine(stats: Statistics) -> None:
    # rank01 a: 8, 2, 4, 0 → 1, 1/3, 2/3, 0; b: 0, 1, 3, 0 → 1/6, 2/3, 1, 1/6
    a, b = np.array([1, 1 / 3, 2 / 3, 0]), np.array([1 / 6, 2 / 3, 1, 1 / 6])
    off = {"floor_lo": 0.0, "floor_hi": 0.0}
    got = score(stats, "class_rank", weights={"a": 3}, breadth=0.5, **off)
    np.testing.assert_allclose(got.values[0], np.maximum(3 * a, b) + 0.5 * (a + b) / 2)
    assert got.protected is None
    got = score(stats, "class_rank", weights={"a": 3}, breadth=0, combine="mean", **off)
    np.testing.assert_allclose(got.values[0], (3 * a + b) / 4)


def test_breadth_leaves_out_classes_without_weight(stats: Statistics) -> None:
    got = score(stats, "class_rank", weights={"b": 0}, breadth=1.0, floor_lo=0, floor_hi=0)
    a = np.array([1, 1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(got.values[0], a + a)


def test_weights_of_three_act_as_a_tier() -> None:
    """What the docstring warns of: with 3 against 1, the light class only decides the heavy class's lowest third."""
    stats = make_statistics(np.random.default_rng(3), ("a", "b"), L=4, E=30, Q=20)
    off = {"breadth": 0, "floor_lo": 0, "floor_hi": 0}
    with_b = score(stats, "class_rank", weights={"a": 3, "b": 1}, **off).values
    alone = score(stats, "class_rank", weights={"a": 3, "b": 0}, **off).values
    upper = rank01(stats.by_class["gf"][0]) > 1 / 3
    np.testing.assert_array_equal(with_b[upper], alone[upper])


def test_floors_follow_layer_relevance() -> None:
    # keep 4: the means of the four largest are 4, 2 and 3 → places 1, 0, 0.5 → 4·(0.5 + place·0.5) = 4, 2, 3
    pooled = np.array([[4.0, 4, 4, 4, 0, 0], [2.0, 2, 2, 2, 1, 0], [6.0, 3, 2, 1, 1, 1]])
    assert floors(pooled, 4, 0.5, 1.0).tolist() == [4, 2, 3]
    assert floors(pooled[:1], 4, 0.5, 1.0).tolist() == [4]  # one layer: nothing to compare, the upper floor
    with pytest.raises(UsageError, match="above"):
        floors(pooled, 4, 1.0, 0.5)


def test_c6_floors_protect_the_strongest_by_class_and_token() -> None:
    # Class a has 10 tokens, b has 2. Per token: layer 0  a 1, .8, .1, 0  b 0, 0, 2, .5; layer 1 half of it.
    gf = [[[10.0, 8, 1, 0], [5, 4, 0.5, 0]], [[0.0, 0, 4, 1], [0, 0, 2, 0.5]]]
    n = [[[5.0, 4, 1, 0], [5, 4, 1, 0]], [[0.0, 0, 1, 1], [0, 0, 1, 1]]]
    stats = hand_statistics(gf, ["a", "b"], n)
    # v = 1, .8, 2, .5 → keep 2: R = 1.5 and .75 → floors 2·1 = 2 and 2·.5 = 1
    got = score(stats, "class_rank", keep=2, floor_lo=0.5, floor_hi=1.0)
    assert got.protected is not None
    assert got.protected.tolist() == [[True, False, True, False], [False, False, True, False]]
    assert "1 to 2" in got.why


def test_class_rank_defaults_are_the_published_ones() -> None:
    stats = make_statistics(np.random.default_rng(0), L=5, E=128, k=8, Q=9)
    got = score(stats, "class_rank")
    assert got.protected is not None
    counts = got.protected.sum(axis=1)
    assert (counts.min(), counts.max()) == (75, 95)


def test_balanced_without_caution_is_a_mix_of_mean_and_maximum(stats: Statistics) -> None:
    a, b = np.array([8, 2, 4, 0]) / 14, np.array([0, 1, 3, 0]) / 4
    got = values(stats, "balanced", caution=0, mix=0.25)
    assert got == pytest.approx((0.75 * (a + b) / 2 + 0.25 * np.maximum(a, b)).tolist())
    got = values(stats, "balanced", caution=0, mix=0, weights={"a": 3})
    assert got == pytest.approx(((3 * a + b) / 4).tolist())


def test_balanced_caution_is_the_ratio_estimators_standard_error(stats: Statistics) -> None:
    # Class a: totals 8 and 6, expert 0 has 6 and 2, p = 8/14; residuals 6 − 8p and 2 − 6p; n/(n−1) = 2
    p = 8 / 14
    s = math.sqrt(2 * ((6 - 8 * p) ** 2 + (2 - 6 * p) ** 2)) / 14
    got = values(stats, "balanced", caution=2.0, mix=0, weights={"b": 0})
    assert got[0] == pytest.approx(p / (1 + 2 * s / p), rel=1e-6)
    assert got[3] == 0


def test_balanced_prefers_the_expert_that_every_question_uses() -> None:
    steady, lucky = [1.0] * 6, [0.0] * 5 + [6.0]
    gf = [[[s, lu, 2.0]] for s, lu in zip(steady, lucky, strict=True)]
    got = values(hand_statistics(gf, ["a"] * 6), "balanced")
    assert got[0] > got[1] > 0
    assert values(hand_statistics(gf, ["a"] * 6), "balanced", caution=0)[:2] == pytest.approx([1 / 4, 1 / 4])


def test_random_depends_on_the_seed_and_the_layer_number_only(stats: Statistics) -> None:
    big = make_statistics(np.random.default_rng(0), L=3, E=4, k=1)
    assert values(stats, "random") == score(big, "random").values[0].tolist()
    assert values(stats, "random") != values(stats, "random", seed=1)


# ---------------------------------------------------------------- weights of questions


def test_whole_weights_equal_repeated_questions(stats: Statistics) -> None:
    repeated = hand_statistics(
        [GF[0], GF[0], GF[1], GF[2], GF[2], GF[2]], ["a", "a", "a", "b", "b", "b"], [N[0], N[0], N[1], N[2], N[2], N[2]]
    )
    weighted = with_weights(stats, [2.0, 1.0, 3.0])
    for name in ("frequency", "ean", "reap", "man", "msan", "easy_ep", "coverage", "class_max", "class_rank"):
        params = {"protect": 1} if name == "coverage" else {}
        np.testing.assert_allclose(
            score(weighted, name, **params).values, score(repeated, name, **params).values, rtol=1e-6, err_msg=name
        )


def test_a_base_without_question_sums_refuses_weights(stats: Statistics) -> None:
    with pytest.raises(UsageError, match="gf_rel"):
        score(with_weights(stats, [2.0, 1.0, 1.0]), "relative")


# ---------------------------------------------------------------- refusals


def test_unknown_names_list_the_choices(stats: Statistics) -> None:
    with pytest.raises(UsageError, match=r"(?s)reep.*reap"):
        score(stats, "reep")
    with pytest.raises(UsageError, match=r"(?s)'foo'.*protect, of"):
        score(stats, "coverage", foo=1)
    with pytest.raises(UsageError, match="no parameter 'stats'"):
        score(stats, "reap", stats=1)
    with pytest.raises(UsageError, match=r"(?s)'code'.*a, b"):
        score(stats, "class_max", weights={"code": 1})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("coverage", {"protect": 1.5}),
        ("coverage", {"protect": True}),
        ("coverage", {"of": "gf_rel"}),
        ("class_max", {"of": "x"}),
        ("class_max", {"weights": [1, 2]}),
        ("class_max", {"weights": {"a": -1}}),
        ("class_max", {"weights": {"a": float("nan")}}),
        ("class_max", {"weights": {"a": 0, "b": 0}}),
        ("class_rank", {"combine": "sum"}),
        ("class_rank", {"breadth": float("nan")}),
        ("class_rank", {"keep": 5}),
        ("class_rank", {"floor_lo": 0.9, "floor_hi": 0.5}),
        ("balanced", {"mix": 2}),
        ("random", {"seed": -1}),
    ],
)
def test_parameters_out_of_bounds(stats: Statistics, name: str, params: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        score(stats, name, **params)


def test_a_class_without_tokens_is_refused_when_asked_for(stats: Statistics) -> None:
    meta = replace(stats.meta, classes=("a", "b", "c"))
    empty = {name: np.concatenate([x, np.zeros((1, 1, 4))]) for name, x in stats.by_class.items()}
    wider = replace(stats, meta=meta, by_class=empty)
    for name in ("class_max", "class_rank", "balanced"):
        with pytest.raises(UsageError, match="'c' has no tokens"):
            score(wider, name)
        np.testing.assert_allclose(score(wider, name, weights={"c": 0}).values, score(stats, name).values)


def test_a_layer_with_nothing_to_rank_is_refused() -> None:
    gf = [[[1.0, 2, 3], [0.0, 0, 0]], [[1.0, 2, 3], [0.0, 0, 0]]]
    stats = hand_statistics(gf, ["a", "b"], [[[1.0, 2, 2], [0, 0, 0]]] * 2)
    for name in ("frequency", "reap", "easy_ep", "coverage", "class_max", "balanced"):
        with pytest.raises(QualityError, match="layer 1"):
            score(stats, name)
    with pytest.raises(QualityError, match=r"(?s)nothing to rank.*all 3 scores are 2"):
        score(hand_statistics([[[2.0, 2, 2]]], ["a"], [[[2.0, 2, 2]]]), "frequency")


@pytest.mark.parametrize("name", [n for n in CRITERIA if n != "random"])
def test_nan_never_becomes_a_rank(name: str) -> None:
    stats = make_statistics(np.random.default_rng(0))
    for sums in (stats.by_class, stats.by_question):
        for key in sums:
            sums[key][0, 1, 2] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(QualityError, match="not finite"):
        score(stats, name)


def test_a_dense_model_has_nothing_to_score(stats: Statistics) -> None:
    dense = replace(stats, meta=replace(stats.meta, layers=()))
    with pytest.raises(UsageError, match="no experts"):
        score(dense, "reap")


# ---------------------------------------------------------------- resampling


def test_resamples_are_seeded_and_centred() -> None:
    stats = make_statistics(np.random.default_rng(0), Q=30)
    scores = score(stats, "class_max")
    a, b = resample(stats, scores, 40, seed=3), resample(stats, scores, 40, seed=3)
    assert a is not None
    assert b is not None
    np.testing.assert_array_equal(a, b)
    assert a.shape == (40, 3, 8)
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_allclose(a.mean(axis=0), scores.values, rtol=0.35, atol=0.2)


def test_a_resample_is_the_criterion_on_the_drawn_questions() -> None:
    """A draw's values are those of a corpus in which each question stands as often as it was drawn."""
    stats = make_statistics(np.random.default_rng(0), Q=9)
    draw = Sums(stats).draw(np.random.default_rng(5))
    times = np.empty(9)
    times[draw.order] = draw.times
    repeated = with_weights(stats, times.tolist())
    for name in ("reap", "coverage", "class_max", "class_rank"):
        scores = score(stats, name)
        drawn = resample(stats, scores, 1, seed=5)
        assert drawn is not None
        np.testing.assert_allclose(drawn[0], score(repeated, name, **scores.params).values, err_msg=name)


def test_no_class_is_lost_in_a_draw() -> None:
    stats = make_statistics(np.random.default_rng(0), Q=6)
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert (Sums(stats).draw(rng).tokens() > 0).all()


def test_nothing_to_resample() -> None:
    stats = make_statistics(np.random.default_rng(0))
    assert resample(stats, score(stats, "random")) is None
    assert resample(stats, score(stats, "relative")) is None  # gf_rel is not kept per question
    with pytest.raises(UsageError, match="other statistics"):
        resample(make_statistics(np.random.default_rng(1)), score(stats, "reap"))


def test_score_all_leaves_out_what_the_corpus_cannot_answer(stats: Statistics) -> None:
    assert [s.criterion for s in score_all(stats)] == list(CRITERIA)
    weighted = with_weights(stats, [2.0, 1.0, 1.0])
    assert [s.criterion for s in score_all(weighted, ("reap", "relative"))] == ["reap"]
