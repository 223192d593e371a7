"""Rows that equal the data."""

from __future__ import annotations

import dataclasses

import pytest
from tests.report.fixture import BASE, full

from gemcut.report import ReportData
from gemcut.report import tables as t
from gemcut.report.spelling import interval


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
    assert table.rows[table.chosen][1] == interval(row.mean)


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
