"""A dataclass comes back as it went out, and nothing that its types do not allow gets in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.errors import CheckpointError
from gemcut.records.fields import Fields, to_json
from gemcut.records.typed import read
from gemcut.types import Estimate, Json

Colour = Literal["red", "green"]


@dataclass(frozen=True, slots=True)
class Inner:
    n: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    flag: bool
    colour: Colour
    words: tuple[Colour, ...]
    texts: tuple[str, ...]
    numbers: tuple[int, ...] | None
    one: Inner
    several: tuple[Inner, ...]
    maybe: Estimate | None
    named: Mapping[str, Inner]
    sums: Mapping[str, float]
    free: Mapping[str, Json]


WHOLE = Outer(
    "x", True, "red", ("green",), ("a",), (1, 2), Inner(3, None), (Inner(4, 0.5),), Estimate(1.0, 0.5, 2.0, 9),
    {"k": Inner(5, 1.0)}, {"s": 2.0}, {"any": [1, {"thing": None}]},
)  # fmt: skip


def fields(value: object) -> Fields:
    return Fields(json.loads(json.dumps(value)), Path("record.json"))


def test_round_trip() -> None:
    assert read(Outer, fields(to_json(WHOLE))) == WHOLE
    empty = replace(WHOLE, words=(), texts=(), numbers=None, several=(), maybe=None, named={}, sums={}, free={})
    assert read(Outer, fields(to_json(empty))) == empty


@given(st.integers(0, 2**53), st.floats(allow_nan=False, allow_infinity=False) | st.none())
def test_numbers_come_back_exactly(n: int, share: float | None) -> None:
    assert read(Inner, fields(to_json(Inner(n, share)))) == Inner(n, share)


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("name", None, "name"),
        ("name", 1, "name"),
        ("flag", 1, "flag"),
        ("colour", "blue", "red or green"),
        ("colour", None, "colour"),
        ("words", ["red", "blue"], r"words\[1\]"),
        ("words", ["red", "red"], "a second time"),
        ("texts", [1], r"texts\[0\]"),
        ("numbers", [-1], r"numbers\[0\]"),
        ("one", None, "one"),
        ("one", {"n": True, "share": 1.0}, "one.n"),
        ("one", {"n": 1}, "one.share"),
        ("several", [{"n": 1, "share": None, "more": 1}], r"several\[0\].more"),
        ("maybe", {"value": 1.0}, "maybe.low"),
        ("named", {"k": 1}, "named.k"),
        ("sums", {"s": float("inf")}, "sums.s"),
        ("free", {"any": float("nan")}, "free.any"),
        ("more", 1, "unknown key"),
    ],
)
def test_what_the_types_do_not_allow(key: str, value: Any, where: str) -> None:
    whole = to_json(WHOLE)
    assert isinstance(whole, dict)
    with pytest.raises(CheckpointError, match=where):
        read(Outer, fields({**whole, key: value}))


def test_what_the_caller_has_read_is_taken() -> None:
    f = fields({"n": "3", "share": None})
    assert read(Inner, f, n=int(f.text("n"))) == Inner(3, None)
