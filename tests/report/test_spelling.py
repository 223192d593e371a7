"""Numbers as text: units, signs, digits that the interval supports."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.report import spelling as t
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


def test_nested_parameters_are_told_apart() -> None:
    value = {"keep": 16, "guards": {"super_factor": 50.0, "class_floor": 0}, "score": {}, "on": True}
    assert t.json_text(value) == "keep = 16, guards = (super_factor = 50, class_floor = 0), score = (none), on = yes"  # type: ignore[arg-type]


def test_a_zero_width_interval_is_finite() -> None:
    text = t.interval(Estimate(0.25, 0.25, 0.25, 3))
    assert all(math.isfinite(float(part.strip("[],"))) for part in text.split())
