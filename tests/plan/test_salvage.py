"""The search for the layers that may stay cut: what passes is kept, and little is tried."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from gemcut.plan.salvage import keep_layers, salvage
from gemcut.types import LayerPlan, Plan

damages = st.dictionaries(st.integers(0, 59), st.floats(0, 1), min_size=1, max_size=30)


@given(damage=damages)
def test_all_layers_stay_when_all_pass(damage: dict[int, float]) -> None:
    found = salvage(damage, lambda layers: True)
    assert found.layers == tuple(sorted(damage))
    assert len(found.trials) == 1
    assert found.restored == ()


@given(damage=damages)
def test_nothing_stays_when_nothing_passes(damage: dict[int, float]) -> None:
    found = salvage(damage, lambda layers: False)
    assert found.layers == ()
    assert found.restored == tuple(sorted(damage))
    assert not any(trial.passed for trial in found.trials)


@given(damage=damages, data=st.data())
def test_layers_that_break_alone_are_found(damage: dict[int, float], data: st.DataObject) -> None:
    """Where a set passes exactly if it holds no bad layer, all others are saved, whatever the order says."""
    bad = data.draw(st.sets(st.sampled_from(sorted(damage))))
    found = salvage(damage, lambda layers: not bad & set(layers))
    assert found.layers == tuple(sorted(set(damage) - bad))


@given(damage=damages, budget=st.floats(0, 10))
def test_a_budget_of_damage_is_filled_from_the_least(damage: dict[int, float], budget: float) -> None:
    def passes(layers: tuple[int, ...]) -> bool:
        return math.fsum(damage[layer] for layer in layers) <= budget

    found = salvage(damage, passes)
    assert not found.layers or passes(found.layers)
    assert all(not passes((*found.layers, layer)) for layer in damage if layer not in found.layers)
    assert len({trial.layers for trial in found.trials}) == len(found.trials)
    assert len(found.trials) <= len(damage) + 8


def test_card_000_keeps_its_first_four_of_sixty() -> None:
    """Sixty layers, of which the first four do least harm and more than four together fail."""
    found = salvage({layer: float(layer) for layer in range(60)}, lambda layers: len(layers) <= 4)
    assert found.layers == (0, 1, 2, 3)
    assert found.restored == tuple(range(4, 60))


def test_what_is_known_to_fail_is_not_tried_again() -> None:
    tried: list[tuple[int, ...]] = []

    def passes(layers: tuple[int, ...]) -> bool:
        tried.append(layers)
        return 3 not in layers

    found = salvage(dict.fromkeys(range(6), 0.0), passes, whole_failed=True)
    assert found.layers == (0, 1, 2, 4, 5)
    assert found.restored == (3,)
    assert tuple(range(6)) not in tried


def test_the_plan_of_what_stays() -> None:
    plan = Plan("heads", "f" * 64, 8, {layer: LayerPlan(tuple(range(7)), {7: "test"}) for layer in range(3)})
    assert set(keep_layers(plan, (0, 2)).layers) == {0, 2}
    assert keep_layers(plan, (0, 2)).units == 8
