from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.score.synthetic_stats import hand_statistics, make_statistics

from gemcut.errors import UsageError
from gemcut.plan import Guards, explain, plan_experts
from gemcut.records import load_plan, save_plan
from gemcut.score import resample, score, score_all

# Layer 0: a routes 4 tokens to expert 0, 3 to 1, 1 to 2; b routes 2 to 2 and 2 to 3.
N = [[[4.0, 3, 1, 0]], [[0.0, 0, 2, 2]]]
GF = [[[8.0, 3, 1, 0]], [[0.0, 0, 4, 1]]]


def test_the_numbers_are_the_statistics() -> None:
    stats = hand_statistics(GF, ["a", "b"], N)
    scores = score(stats, "ean")  # 16, 6, 10, 2
    planned = plan_experts(scores, 2, stats=stats)
    found = explain(planned, scores, stats, 0, 2, others=[score(stats, "frequency"), score(stats, "reap")])
    assert (found.kept, found.tokens, found.guard) == (True, 3, None)
    assert found.reason == "ean 10, rank 2 of 4, cut at 10"
    assert found.routed_share == pytest.approx(3 / 12)
    assert [(u.cls, u.tokens, u.share, u.weighted_norm) for u in found.per_class] == [
        ("a", 1, pytest.approx(1 / 8), pytest.approx(1 / 3)),
        ("b", 2, pytest.approx(1 / 2), pytest.approx(4 / 1.25)),
    ]
    # frequency 4, 3, 3, 2: the tie goes to expert 1; reap 2, 1, 5/3, 1/2
    assert [(s.criterion, s.rank) for s in found.standings] == [("ean", 2), ("frequency", 3), ("reap", 2)]
    assert [(n.unit, n.kept) for n in found.above] == [(0, True)]
    assert [(n.unit, n.rank, n.kept) for n in found.below] == [(1, 3, False), (3, 4, False)]
    # f_max here is f per token and class: 4, 2, max(2, 4), 1
    assert (found.f_max, found.f_max_median) == (pytest.approx(4), pytest.approx(3))


def test_a_dropped_unit_shows_its_reason_and_its_chances() -> None:
    stats = make_statistics(np.random.default_rng(1))
    scores = score(stats, "balanced")
    planned = plan_experts(scores, 4, stats=stats, resampled=resample(stats, scores, 20))
    unit = next(iter(planned.plan.layers[1].drop))
    found = explain(planned, scores, stats, 1, unit)
    assert not found.kept
    assert found.reason == planned.plan.layers[1].drop[unit]
    assert planned.keep_probability is not None
    assert found.keep_probability == planned.keep_probability[1, unit]
    assert found.resamples == 20
    assert found.text().count("resamples") == 1
    kept = explain(planned, scores, stats, 1, planned.plan.layers[1].keep[0])
    assert kept.text().count("resamples") == 1
    twice = explain(planned, scores, stats, 1, unit, others=score_all(stats))
    assert len({s.criterion for s in twice.standings}) == len(twice.standings)


def test_a_guarded_unit_says_which_guard() -> None:
    stats = hand_statistics(GF, ["a", "b"], N)
    scores = score(stats, "ean")
    planned = plan_experts(scores, 3, stats=stats, guards=Guards(None, class_floor=1))
    assert explain(planned, scores, stats, 0, 0).guard == "among the best 1 of class a"
    assert "guard: among the best 1 of class a" in explain(planned, scores, stats, 0, 0).text()


def test_a_plan_from_disk_is_explained_too(tmp_path: Path) -> None:
    stats = hand_statistics(GF, ["a", "b"], N)
    scores = score(stats, "ean")
    save_plan(plan_experts(scores, 3, stats=stats, guards=Guards(None, class_floor=1)).plan, tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert explain(plan, scores, stats, 0, 2).guard == "among the best 1 of class b"
    assert explain(plan, scores, stats, 0, 3).reason.startswith("ean 2, rank 4 of 4")


def test_one_screen() -> None:
    stats = make_statistics(np.random.default_rng(1), [f"class{i}" for i in range(20)], Q=40)
    scores = score(stats, "class_max")
    planned = plan_experts(scores, 4, stats=stats, resampled=resample(stats, scores, 5))
    for unit in range(8):
        text = explain(planned, scores, stats, 2, unit, others=score_all(stats)).text()
        assert len(text.splitlines()) <= 40
        assert max(map(len, text.splitlines())) <= 120
        assert "and 10 classes more" in text


@pytest.mark.parametrize(("layer", "unit"), [(3, 0), (-1, 0), (0, 8), (0, -1)])
def test_no_such_unit(layer: int, unit: int) -> None:
    stats = make_statistics(np.random.default_rng(1))
    scores = score(stats, "reap")
    with pytest.raises(UsageError, match="there is no"):
        explain(plan_experts(scores, 4), scores, stats, layer, unit)


def test_what_does_not_belong_together() -> None:
    stats, other = (make_statistics(np.random.default_rng(seed)) for seed in (1, 2))
    scores = score(stats, "reap")
    with pytest.raises(UsageError, match="belong together"):
        explain(plan_experts(scores, 4), scores, stats, 0, 0, others=[score(other, "reap")])
