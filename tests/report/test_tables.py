"""Numbers as text: units, signs, digits that the interval supports, and rows that equal the data."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.fixture import BASE, full

from gemcut.report import ReportData
from gemcut.report import tables as t
from gemcut.types import Estimate


@pytest.mark.parametrize(
    ("size_bytes", "wanted"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (24_438_464, "23.31 MiB"),
        (10_920_000_000, "10.17 GiB"),
        (-(3 << 20), "−3.00 MiB"),
        (212 << 30, "212.0 GiB"),
    ],
)
def test_size(size_bytes: int, wanted: str) -> None:
    assert t.size(size_bytes) == wanted


@pytest.mark.parametrize(
    ("value", "low", "high", "wanted"),
    [
        (0.0312, 0.0283, 0.0342, "0.031 [0.028, 0.034]"),
        (0.0312, 0.0299, 0.0325, "0.0312 [0.0299, 0.0325]"),
        (-0.00004, -0.03, 0.03, "0.00 [−0.03, 0.03]"),
        (0.0, 0.0, 0.0, "0 [0, 0]"),
        (12.3, 8.0, 17.0, "12 [8, 17]"),
    ],
)
def test_interval_shows_the_digits_that_it_supports(value: float, low: float, high: float, wanted: str) -> None:
    assert t.interval(Estimate(value, low, high, 240)) == wanted


def test_estimate_carries_n() -> None:
    assert t.estimate(Estimate(0.0312, 0.0283, 0.0342, 1240), "chunks") == "0.031 [0.028, 0.034] (n = 1,240 chunks)"


@given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3), st.floats(-1e3, 1e3))
def test_rounding_never_moves_a_bound_by_more_than_a_third_of_the_half_width(a: float, b: float, value: float) -> None:
    shown = Estimate(value, value - a, value + b, 2)
    numbers = t.interval(shown).replace("−", "-").replace(",", "").replace("[", "").replace("]", "").split()
    half = max((a + b) / 2, 1e-12)
    for text, exact in zip(numbers, (shown.value, shown.low, shown.high), strict=True):
        assert abs(float(text) - exact) <= half / 3 + 1e-9 * abs(exact) or half < 2e-12


def test_change_and_signs() -> None:
    assert t.change(200, 150) == "−25.0 %"
    assert t.change(200, 200) == "±0 %"
    assert t.signed(-0.0001, 2) == "±0.00"
    assert t.duration(59.96) == "60.0 s"
    assert t.duration(185) == "3 min 05 s"
    assert t.duration(7620) == "2 h 07 min"


def test_wilson_matches_the_published_example() -> None:
    low, high = t.wilson(15 / 148, 148)  # Newcombe (1998), table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert t.wilson(0.0, 0) == (0.0, 1.0)
    assert t.wilson(1.0, 200)[1] == pytest.approx(1.0)


def test_headline_has_n_and_interval() -> None:
    line = t.headline(full())
    assert line.startswith("Kept 24 of 32 experts in each of 12 layers: 23.31 MiB instead of 28.26 MiB (−17.5 %)")
    assert "0.0312 [0.0293, 0.0333] nats per token (mean KLD, n = 240 chunks, 61,440 tokens)" in line


def test_headline_without_a_measurement_says_so() -> None:
    assert t.headline(ReportData("x", BASE, BASE)).endswith("What it cost has not been measured.")


def test_criteria_are_sorted_and_the_chosen_one_is_marked() -> None:
    data = full()
    table = t.criteria_rows(data)
    assert table is not None
    assert table.rows[0][0] == "base (base against itself)"
    assert table.chosen is not None
    assert table.rows[table.chosen][0] == data.chosen == "class_rank"
    shown = [float(row[1].split()[0]) for row in table.rows]
    assert shown == sorted(shown)
    row = data.kld[0].row()
    assert row is not None
    assert table.rows[table.chosen][1] == t.interval(row.mean)


def test_class_rows_end_with_all_classes() -> None:
    table = t.class_rows(full())
    assert table is not None
    assert table.rows[-1][0] == "all classes"
    assert len(table.rows) == 7
    damage = [float(row[1].split()[0]) for row in table.rows[:-1]]
    assert damage == sorted(damage, reverse=True)


def test_closest_calls_are_the_nearest_to_one_half() -> None:
    data = full()
    table = t.doubt_rows(data, limit=3)
    assert table is not None
    assert data.keep_probability is not None
    distance = sorted(abs(p - 0.5) for p in data.keep_probability.flat)[:3]
    assert [abs(float(row[2].split()[0]) - 0.5) for row in table.rows] == pytest.approx(distance, abs=0.006)
    inside = ((data.keep_probability > 0.05) & (data.keep_probability < 0.95)).sum()
    assert t.near_ties(data) == inside


def test_dropped_rows_name_every_dropped_unit() -> None:
    data = full()
    table = t.dropped_rows(data)
    assert table is not None
    assert data.plan is not None
    for layer, row in zip(data.layers, table.rows, strict=True):
        assert [int(text) for text in row[2].split(", ")] == sorted(data.plan.layers[layer].drop)


def test_dropped_rows_name_ties_and_guarded_units() -> None:
    data = full()
    table = t.dropped_rows(data)
    assert table is not None
    assert data.plan is not None
    assert data.plan_scores is not None
    held = 0
    for row, cells in enumerate(table.rows):
        values, layer = data.plan_scores.values[row], data.plan.layers[data.layers[row]]
        for unit in (int(text) for text in cells[4].split(", ") if text != "–"):
            held += 1
            assert unit in layer.keep
            assert any(mask[row, unit] for mask in data.protected.values())
            assert any(values[other] > values[unit] for other in layer.drop)  # it took a better one's place
    assert held > 0
    assert any(set(row[3].split(", ")) & set(row[2].split(", ")) for row in table.rows)


def test_nested_parameters_are_told_apart() -> None:
    value = {"keep": 16, "guards": {"super_factor": 50.0, "class_floor": 0}, "score": {}, "on": True}
    assert t.json_text(value) == "keep = 16, guards = (super_factor = 50, class_floor = 0), score = (none), on = yes"  # type: ignore[arg-type]


def test_components_sum_to_the_total() -> None:
    data = full()
    assert sum(data.base.components.values()) == data.base.size_bytes
    assert sum(data.candidate.components.values()) == data.candidate.size_bytes
    rows = t.component_rows(data.base, data.candidate).rows
    assert rows[-1] == ("total", "28.26 MiB", "23.31 MiB", "−17.5 %")


def test_changes_are_grouped_over_layers() -> None:
    table = t.change_rows(full())
    assert table is not None
    assert table.rows[0] == (
        "model.language_model.layers.*.experts.gate_up_proj", "0–11 (12)", "–", "take", "[32, 352, 256]",
        "[24, 352, 256]", "–",
    )  # fmt: skip


def test_layers_are_told_as_ranges() -> None:
    assert t.spans([]) == "–"
    assert t.spans([4]) == "4"
    assert t.spans([3, 0, 1, 2, 7, 9, 8]) == "0–3, 7–9 (7)"


def test_a_zero_width_interval_is_finite() -> None:
    text = t.interval(Estimate(0.25, 0.25, 0.25, 3))
    assert all(math.isfinite(float(part.strip("[],"))) for part in text.split())


def test_failed_checks_are_shouted() -> None:
    data = full()
    failed = dataclasses.replace(data, checks=(dataclasses.replace(data.checks[0], passed=False), *data.checks[1:]))
    assert t.key_figures(failed)[-1].value == "FAILED"
    assert t.key_figures(data)[-1].value == "passed"


def test_heads_are_called_heads() -> None:
    data = full()
    assert data.plan is not None
    heads = dataclasses.replace(data, plan=dataclasses.replace(data.plan, kind="heads"), statistics=None)
    assert "24 of 32 query heads in each of 12 layers" in t.headline(heads)
    table = t.dropped_rows(heads)
    assert table is not None
    assert table.columns[2] == "Dropped query heads"
