from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.score.synthetic_stats import make_statistics

from gemcut.errors import UsageError
from gemcut.plan import diff_plans, plan_experts
from gemcut.score import score
from gemcut.types import LayerPlan, Plan


def plan_of(drops: dict[int, set[int]], units: int = 10) -> Plan:
    layers = {
        layer: LayerPlan(tuple(u for u in range(units) if u not in drop), dict.fromkeys(sorted(drop), "x"))
        for layer, drop in drops.items()
    }
    return Plan("experts", "m", units, layers)


def test_counts_by_hand() -> None:
    found = diff_plans(plan_of({0: {1, 2, 3}, 1: {0}}), plan_of({0: {2, 3, 4}, 1: {9}}))
    assert [(d.only_a, d.only_b, d.both) for d in found.layers] == [((1,), (4,), (2, 3)), ((0,), (9,), ())]
    assert (found.drops_a, found.drops_b, found.shared) == (4, 4, 2)
    assert found.overlap == 0.5
    assert found.jaccard == pytest.approx(2 / 6)
    # 3·3/10 + 1·1/10 = 1 of 4; variances 3·.3·.7·7/9 and 1·.1·.9·9/9
    assert found.expected == pytest.approx(0.25)
    assert found.expected_sd == pytest.approx(math.sqrt(3 * 0.3 * 0.7 * 7 / 9 + 0.09) / 4)
    assert not found.same


def test_a_plan_equals_itself_and_a_missing_layer_drops_nothing() -> None:
    a = plan_of({0: {1}, 2: {3}})
    assert diff_plans(a, a).same
    assert diff_plans(a, a).overlap == diff_plans(a, a).jaccard == 1
    assert diff_plans(a, plan_of({0: {1}})).layers[1].only_a == (3,)
    nothing = plan_of({0: set()})
    assert diff_plans(nothing, nothing).overlap == 1


def test_other_units_are_refused_and_other_models_are_said() -> None:
    with pytest.raises(UsageError, match="same units"):
        diff_plans(plan_of({0: {1}}), plan_of({0: {1}}, units=9))
    assert not diff_plans(plan_of({0: {1}}), replace(plan_of({0: {1}}), model_fingerprint="other")).same_model


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_random_plans_share_what_chance_says(seed: int) -> None:
    stats = make_statistics(np.random.default_rng(0), L=20, E=32, Q=4)
    a = plan_experts(score(stats, "random", seed=seed % 1000), 24).plan
    b = plan_experts(score(stats, "random", seed=seed % 1000 + 1000), 24).plan
    found = diff_plans(a, b)
    assert found.expected == pytest.approx(8 / 32)
    assert abs(found.overlap - found.expected) < 5 * found.expected_sd
