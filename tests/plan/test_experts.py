from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.score.synthetic_stats import hand_statistics, make_statistics

from gemcut.errors import QualityError, UsageError
from gemcut.plan import Guards, kept_matrix, plan_experts, super_experts
from gemcut.records import load_plan, save_plan
from gemcut.score import resample, score
from gemcut.types import Scores, Statistics

PURE = ["random", "frequency", "ean", "reap", "relative", "man", "msan", "easy_ep", "coverage", "class_max", "balanced"]
NO_GUARDS = Guards(super_factor=None)


def scores_of(values: list[list[float]], protected: list[list[bool]] | None = None) -> Scores:
    return Scores(
        criterion="reap",
        params={},
        kind="experts",
        layers=tuple(range(len(values))),
        values=np.array(values),
        model_fingerprint="m",
        statistics_fingerprint="s",
        corpus_hash="c",
        protected=None if protected is None else np.array(protected),
        why="floor" if protected else "",
    )


@pytest.fixture
def stats() -> Statistics:
    return make_statistics(np.random.default_rng(1))


def test_the_highest_scores_stay_and_ties_go_to_the_lower_index() -> None:
    plan = plan_experts(scores_of([[1, 5, 3, 3, 0], [2, 2, 2, 2, 9]]), 2).plan
    assert plan.layers[0].keep == (1, 2)
    assert plan.layers[1].keep == (0, 4)


def test_every_drop_says_why() -> None:
    planned = plan_experts(
        scores_of([[1, 5, 3, 3, 0]]), 2, resampled=np.array([[[1, 5, 3, 3, 0]], [[4, 5, 3, 3, 0.0]]])
    )
    drop = planned.plan.layers[0].drop
    assert drop[0] == "reap 1, rank 4 of 5, cut at 3 (unit 2), kept in 50 % of 2 resamples"
    assert drop[3] == "reap 3, rank 3 of 5, cut at 3 (unit 2), kept in 0 % of 2 resamples"
    assert planned.keep_probability is not None
    assert planned.keep_probability.tolist() == [[0.5, 1.0, 0.5, 0.0, 0.0]]
    assert planned.doubtful == 2


def test_keep_everything_is_the_identity() -> None:
    plan = plan_experts(scores_of([[1, 2, 3]]), 3).plan
    assert plan.layers[0].keep == (0, 1, 2)
    assert not plan.layers[0].drop


@pytest.mark.parametrize(("keep", "named"), [(1, "at least 2"), (0, "at least 2"), (9, "at most 8")])
def test_illegal_budgets_name_the_legal_ones(stats: Statistics, keep: int, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        plan_experts(score(stats, "reap"), keep, stats=stats)


@pytest.mark.parametrize("name", PURE)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_smaller_budgets_are_nested(name: str, seed: int) -> None:
    stats = make_statistics(np.random.default_rng(seed))
    scores = score(stats, name)
    larger = np.ones((3, 8), np.bool_)
    for keep in range(8, 1, -1):
        kept = kept_matrix(plan_experts(scores, keep, stats=stats, guards=NO_GUARDS).plan)
        assert (kept.sum(axis=1) == keep).all()
        assert not (kept & ~larger).any()
        larger = kept


def test_a_plan_survives_the_disk(stats: Statistics, tmp_path: Path) -> None:
    scores = score(stats, "class_rank")
    plan = plan_experts(scores, 4, stats=stats, guards=Guards(class_floor=1), resampled=resample(stats, scores, 5)).plan
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.params["score"] == scores.params
    assert plan.statistics_fingerprint == stats.fingerprint


def test_statistics_of_another_run_are_refused(stats: Statistics) -> None:
    with pytest.raises(UsageError, match="other statistics"):
        plan_experts(score(stats, "reap"), 4, stats=make_statistics(np.random.default_rng(2)))


# ---------------------------------------------------------------- guards


def with_super_expert(stats: Statistics, layer: int, expert: int, times: float) -> Statistics:
    f_max = stats.by_class["f_max"].copy()
    f_max[:, layer, expert] = times * np.median(f_max.max(axis=0)[layer])
    return replace(stats, by_class={**stats.by_class, "f_max": f_max})


def test_a_super_expert_stays_whatever_its_score(stats: Statistics) -> None:
    scores = score(stats, "frequency")
    worst = int(scores.values[1].argmin())
    found = with_super_expert(stats, 1, worst, 900)
    planned = plan_experts(scores, 3, stats=found)
    assert worst in planned.plan.layers[1].keep
    assert worst not in plan_experts(scores, 3, stats=found, guards=NO_GUARDS).plan.layers[1].keep
    assert planned.plan.params["guarded"] == {"1": {str(worst): planned.guarded.reasons[1, worst]}}
    assert "super expert" in planned.guarded.reasons[1, worst]
    assert planned.kept_by_guards == 1
    assert "1 guarded units with lower scores stay" in next(
        line for unit, line in planned.plan.layers[1].drop.items() if scores.values[1, unit] > scores.values[1, worst]
    )


def test_super_experts_are_huge_in_their_layer_and_rare_in_the_model(stats: Statistics) -> None:
    found = with_super_expert(stats, 2, 5, 900)
    assert np.argwhere(super_experts(found, 50, 0.005)).tolist() == [[2, 5]]
    assert not super_experts(found, 1000, 0.005).any()
    second = with_super_expert(found, 0, 1, 80)
    assert np.argwhere(super_experts(second, 50, 0.005)).tolist() == [[2, 5]]  # one in 24 is more than half a percent
    assert np.argwhere(super_experts(second, 50, 0.1)).tolist() == [[0, 1], [2, 5]]


def test_too_many_super_experts(stats: Statistics) -> None:
    found = stats
    for expert in range(3):
        found = with_super_expert(found, 1, expert, 900 + expert)
    with pytest.raises(QualityError, match=r"(?s)layer 1.*3 super experts"):
        plan_experts(score(stats, "reap"), 2, stats=found, guards=Guards(super_share=1.0), top_k=1)


def test_class_floors_keep_each_class_its_best() -> None:
    # Class b speaks softly: pooled, its only expert is the worst.
    stats = hand_statistics([[[9.0, 8, 7, 0]], [[0.0, 0, 0.1, 0.5]]], ["a", "b"])
    scores = score(stats, "ean")
    assert plan_experts(scores, 3, stats=stats, guards=NO_GUARDS).plan.layers[0].keep == (0, 1, 2)
    planned = plan_experts(scores, 3, stats=stats, guards=Guards(None, class_floor=1))
    assert planned.plan.layers[0].keep == (0, 1, 3)
    assert planned.guarded.reasons == {(0, 0): "among the best 1 of class a", (0, 3): "among the best 1 of class b"}


def test_class_floors_that_do_not_fit_say_which_do() -> None:
    stats = hand_statistics([[[9.0, 8, 1, 2, 0.5]], [[1.0, 2, 8, 9, 0.5]]], ["a", "b"])
    with pytest.raises(UsageError, match=r"(?s)4 units protected.*keep = 3.*class_floor=1 fits"):
        plan_experts(score(stats, "ean"), 3, stats=stats, guards=Guards(None, class_floor=2))


def test_class_floors_need_statistics_or_class_scores() -> None:
    with pytest.raises(UsageError, match="needs the statistics"):
        plan_experts(scores_of([[1, 2, 3]]), 2, guards=Guards(class_floor=1))


def test_floors_of_the_criterion_override_scores_and_say_so() -> None:
    planned = plan_experts(scores_of([[1, 5, 3, 4]], [[True, False, False, False]]), 2)
    assert planned.plan.layers[0].keep == (0, 1)
    assert planned.kept_by_guards == 1
    assert planned.plan.layers[0].drop[3].endswith("cut at 5 (unit 1), 1 guarded units with lower scores stay")
    assert planned.guarded.reasons[0, 0] == "floor"


def test_over_full_floors_release_the_lowest_first() -> None:
    planned = plan_experts(scores_of([[1, 5, 3, 4]], [[True, True, True, False]]), 2)
    assert planned.plan.layers[0].keep == (1, 2)
    assert planned.guarded.notes == ("layer 0: 1 protected units released, lowest scores first",)
    assert planned.plan.params["notes"] == list(planned.guarded.notes)
    assert "every place is taken by a guard" in planned.plan.layers[0].drop[3]


def test_floors_made_for_another_budget_are_noted(stats: Statistics) -> None:
    planned = plan_experts(score(stats, "class_rank", keep=6), 4, stats=stats)
    assert any("made for keep = 6, this plan keeps 4" in str(note) for note in planned.plan.params["notes"])  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [{"super_factor": 1.0}, {"super_share": 0.0}, {"class_floor": -1}])
def test_guards_check_their_bounds(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="out of bounds"):
        Guards(**bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- keep probability


def test_keep_probabilities_share_out_the_budget(stats: Statistics) -> None:
    scores = score(stats, "reap")
    planned = plan_experts(scores, 5, stats=stats, resampled=resample(stats, scores, 50, seed=1))
    assert planned.keep_probability is not None
    np.testing.assert_allclose(planned.keep_probability.sum(axis=1), 5)
    again = plan_experts(scores, 5, stats=stats, resampled=resample(stats, scores, 50, seed=1))
    assert again.plan == planned.plan


def test_a_guarded_unit_stays_in_every_resample(stats: Statistics) -> None:
    scores = score(stats, "frequency")
    worst = int(scores.values[1].argmin())
    found = with_super_expert(stats, 1, worst, 900)
    planned = plan_experts(scores, 3, stats=found, resampled=resample(stats, scores, 20))
    assert planned.keep_probability is not None
    assert planned.keep_probability[1, worst] == 1


def test_more_questions_make_decisions_firmer() -> None:
    def doubt(questions: int) -> int:
        stats = make_statistics(np.random.default_rng(0), L=4, E=16, Q=questions)
        scores = score(stats, "easy_ep")
        return plan_experts(scores, 8, stats=stats, resampled=resample(stats, scores, 100)).doubtful

    assert doubt(240) < doubt(6)


def test_resamples_of_another_shape(stats: Statistics) -> None:
    with pytest.raises(UsageError, match="another shape"):
        plan_experts(score(stats, "reap"), 4, stats=stats, resampled=np.zeros((3, 2, 8)))
