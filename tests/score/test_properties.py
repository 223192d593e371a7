"""What holds for every criterion, whatever the numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.score.synthetic_stats import make_statistics, merge, permute_experts, pick_questions

from gemcut.score import CRITERIA, score

RANKED = [name for name in CRITERIA if name != "random"]
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", RANKED)
@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_permuting_experts_permutes_scores(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = make_statistics(rng)
    order = rng.permutation(8)
    a, b = score(stats, name), score(permute_experts(stats, order), name)
    np.testing.assert_allclose(b.values, a.values[:, order], rtol=1e-12)
    if a.protected is not None and b.protected is not None:
        np.testing.assert_array_equal(b.protected, a.protected[:, order])


@pytest.mark.parametrize("name", RANKED)
@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_observing_in_two_shards_changes_nothing(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = make_statistics(rng)
    order = rng.permutation(12)
    cut = int(rng.integers(1, 12))
    merged = merge(pick_questions(stats, order[:cut].tolist()), pick_questions(stats, order[cut:].tolist()))
    np.testing.assert_allclose(score(merged, name).values, score(stats, name).values, rtol=1e-9)


@pytest.mark.parametrize("name", ["class_max", "balanced"])
@given(seed=seeds, factor=st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_a_louder_class_changes_nothing(name: str, seed: int, factor: float) -> None:
    stats = make_statistics(np.random.default_rng(seed))
    code = [i for i, q in enumerate(stats.meta.questions) if q.cls == "code"]
    by_class = {key: array.copy() for key, array in stats.by_class.items()}
    by_question = {key: array.copy() for key, array in stats.by_question.items()}
    for key in by_question:
        by_question[key][code] *= np.float32(factor)
        by_class[key][0] *= float(np.float32(factor))
    louder = replace(stats, by_class=by_class, by_question=by_question)
    np.testing.assert_allclose(score(louder, name).values, score(stats, name).values, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in RANKED if n != "class_rank"])
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_an_expert_never_routed_goes_first(name: str, seed: int) -> None:
    stats = make_statistics(np.random.default_rng(seed), E=9)
    for sums in (stats.by_class, stats.by_question):
        for array in sums.values():
            array[:, :, 4] = 0
    values = score(stats, name).values
    assert (values[:, 4] == values.min(axis=1)).all()
    assert (values[:, 4] == 0).all()


@pytest.mark.parametrize("name", list(CRITERIA))
def test_parameters_are_recorded_with_their_defaults(name: str) -> None:
    stats = make_statistics(np.random.default_rng(0))
    scores = score(stats, name)
    assert set(scores.params) == set(CRITERIA[name].params)
    np.testing.assert_array_equal(score(stats, name, **scores.params).values, scores.values)


def test_the_map_and_the_files_agree_on_names() -> None:
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.about
        assert criterion.rank.__module__ == f"gemcut.score.{name}"
