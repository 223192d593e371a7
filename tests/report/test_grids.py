"""The grids behind the figures, against small cases that can be checked by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.report.fixture import full, statistics

from gemcut.report.grids import cut_grid, mass_over_uniform, specialisation


def test_cut_grid_orders_by_score_and_marks_fate() -> None:
    data = full()
    grid = cut_grid(data)
    assert grid is not None
    assert data.plan is not None
    assert data.plan_scores is not None
    assert grid.by_score
    sorted_scores = np.take_along_axis(data.plan_scores.values, grid.order, axis=1)
    assert (np.diff(sorted_scores, axis=1) <= 0).all()
    for row, layer in enumerate(grid.layers):
        dropped = {int(unit) for unit in grid.order[row][grid.state[row] == 0]}
        assert dropped == set(data.plan.layers[layer].drop)
    assert len(grid.reasons) == 2
    for i, reason in enumerate(grid.reasons):
        rows, columns = np.nonzero(grid.state == 2 + i)
        assert len(rows)
        assert (columns >= grid.kept[rows]).all()  # beyond the edge: only the guard keeps it
        assert data.protected[reason][rows, grid.order[rows, columns]].all()


def test_cut_grid_without_scores_puts_kept_units_first() -> None:
    grid = cut_grid(dataclasses.replace(full(), scores={}, protected={}, keep_probability=None))
    assert grid is not None
    assert not grid.by_score
    assert (np.diff((grid.state == 0).astype(int), axis=1) >= 0).all()
    assert not grid.near_tie.any()


def test_no_plan_no_grid() -> None:
    assert cut_grid(dataclasses.replace(full(), plan=None, protected={}, keep_probability=None)) is None


def test_mass_over_uniform_averages_to_one() -> None:
    stats = statistics()
    mass, name = mass_over_uniform(stats)
    assert name == "g"
    assert mass.mean(axis=2) == pytest.approx(np.ones(mass.shape[:2]))
    silent = dataclasses.replace(stats, by_class={"n": np.zeros_like(stats.by_class["n"])})
    values, name = mass_over_uniform(silent)
    assert name == "n"
    assert not values.any()


def with_counts(counts: np.ndarray, per_class: int) -> object:
    stats = statistics(("a", "b"))
    meta = dataclasses.replace(
        stats.meta,
        questions=tuple(q for cls in "ab" for q in [q for q in stats.meta.questions if q.cls == cls][:per_class]),
        layers=(0,),
        experts=counts.shape[2],
    )
    return dataclasses.replace(stats, meta=meta, by_question={"n": counts.astype(np.float32)})


def test_disjoint_classes_have_distance_one_and_equal_ones_zero() -> None:
    apart = np.zeros((8, 1, 4))
    apart[:4, 0, :2] = 5
    apart[4:, 0, 2:] = 5
    found = specialisation(with_counts(apart, 4), rounds=50)  # type: ignore[arg-type]
    assert found is not None
    assert found.distance == pytest.approx(np.ones((2, 1)))
    assert found.chance[0] <= 1.0
    alike = specialisation(with_counts(np.ones((8, 1, 4)), 4), rounds=50)  # type: ignore[arg-type]
    assert alike is not None
    assert alike.distance == pytest.approx(np.zeros((2, 1)))


def test_shuffled_classes_stay_below_the_chance_line() -> None:
    rng = np.random.default_rng(5)
    outside = 0
    for trial in range(20):
        noise = rng.multinomial(200, np.full(8, 1 / 8), (40, 1)).astype(float)
        found = specialisation(with_counts(noise, 20), rounds=80, seed=trial)  # type: ignore[arg-type]
        assert found is not None
        outside += int(found.distance.max() > found.chance.max())
    assert outside <= 3  # about 1 in 40 is expected


def test_intervals_hold_the_estimate_and_are_reproducible() -> None:
    one, two = specialisation(statistics()), specialisation(statistics())
    assert one is not None
    assert two is not None
    assert (one.low == two.low).all()
    assert (one.chance == two.chance).all()
    assert ((one.low <= one.distance) & (one.distance <= one.high)).all()


def test_too_little_to_say() -> None:
    assert specialisation(statistics(("only",))) is None
    stats = statistics()
    assert specialisation(dataclasses.replace(stats, by_question={})) is None
