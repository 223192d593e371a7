from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.errors import CheckpointError, GemcutError, UsageError
from gemcut.records import BY_HAND, load_plan, plan_text, save_plan
from gemcut.types import LayerPlan, Plan

PLAN: dict[str, Any] = {
    "schema": 1,
    "kind": "experts",
    "model": "ab" * 32,
    "units": 5,
    "layers": {"0": {"keep": [0, 1, 4], "drop": {"2": "low", "3": "lower"}}, "7": {"drop": [1]}},
}


def write(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    copy = json.loads(json.dumps(PLAN))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def test_hand_edited_layers_are_completed(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, changed(("layers", "2"), {"keep": [4, 0]})))
    assert plan.layers[0] == LayerPlan((0, 1, 4), {2: "low", 3: "lower"})
    assert plan.layers[7] == LayerPlan((0, 2, 3, 4), {1: BY_HAND})
    assert plan.layers[2] == LayerPlan((0, 4), {1: BY_HAND, 2: BY_HAND, 3: BY_HAND})
    assert plan.criterion == "hand"
    assert list(plan.layers) == [0, 2, 7]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("units",), "5", "units"),
        (("units",), True, "units"),
        (("units",), 10**12, "units"),
        (("kind",), "neurons", "kind"),
        (("model",), 3, "model"),
        (("model",), "", "model"),
        (("layers",), [], "layers"),
        (("layers",), {}, "layers"),
        (("layers", "0", "keep"), [0, 1, 5], r"layers.0.keep\[2\]"),
        (("layers", "0", "keep"), [0, 1, 1], r"layers.0.keep\[2\]"),
        (("layers", "0", "keep"), [0, 1, 4.0], r"layers.0.keep\[2\]"),
        (("layers", "0", "keep"), [0, 1, -1], r"layers.0.keep\[2\]"),
        (("layers", "0", "keep"), [0, 1], "nothing about unit 4"),
        (("layers", "0", "keep"), [0, 1, 2, 4], "dropped too"),
        (("layers", "0", "drop"), {"2": 1, "3": "x"}, "layers.0.drop.2"),
        (("layers", "0", "drop"), {"02": "x", "3": "x"}, "layers.0.drop.02"),
        (("layers", "0", "drop"), {"9": "x"}, "layers.0.drop.9"),
        (("layers", "0", "drop"), None, "layers.0.drop"),
        (("layers", "7"), {}, "neither keep nor drop"),
        (("layers", "7"), {"keep": []}, "no unit"),
        (("layers", "-1"), {"keep": [0]}, "layers.-1"),
        (("layers", "٣"), {"keep": [0]}, "as the key"),
        (("layers", "0", "kept"), [0], "layers.0.kept"),
        (("params",), {"a": [float("nan")]}, r"params.a\[0\]"),
        (("keep",), 3, "unknown key"),
        (("schema",), 2, "newer gemcut"),
        (("schema",), 0, "older gemcut"),
        (("schema",), "1", "schema"),
    ],
)
def test_a_wrong_plan_is_named_by_path(tmp_path: Path, path: tuple[str, ...], value: object, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_plan(write(tmp_path, changed(path, value)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": 1, "schema": 1}', "null", "[" * 100_000, '{"schema": 1e999}']
)
def test_not_a_plan(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError):
        load_plan(write(tmp_path, text))


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Unicode"):
        load_plan(write(tmp_path, json.dumps(PLAN).replace('"low"', '"\\ud800"')))


def test_an_existing_plan_needs_force(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    with pytest.raises(UsageError, match="exists already"):
        save_plan(plan, tmp_path / "plan.json")
    save_plan(plan, tmp_path / "plan.json", force=True)


def test_an_inconsistent_plan_is_never_written(tmp_path: Path) -> None:
    plan = Plan("experts", "m", 4, {0: LayerPlan((0, 1), {2: "x"})})
    with pytest.raises(UsageError, match="exactly once"):
        save_plan(plan, tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_one_line_per_dropped_unit(tmp_path: Path) -> None:
    before = plan_text(load_plan(write(tmp_path, PLAN))).splitlines()
    after = plan_text(load_plan(write(tmp_path, changed(("layers", "0", "drop", "3"), "lowest")))).splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    units = draw(st.integers(1, 12))
    layers = {}
    for layer in draw(st.sets(st.integers(0, 60), min_size=1, max_size=4)):
        keep = draw(st.sets(st.integers(0, units - 1), min_size=1))
        text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        layers[layer] = LayerPlan(tuple(sorted(keep)), {u: draw(text) for u in range(units) if u not in keep})
    json_value = st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        max_leaves=4,
    )
    return Plan(
        kind=draw(st.sampled_from(["experts", "heads"])),  # type: ignore[arg-type]
        model_fingerprint="f",
        units=units,
        layers=dict(sorted(layers.items())),
        criterion=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=9)),
        params=draw(st.dictionaries(st.sampled_from("xyz"), json_value, max_size=3)),
    )


@given(plan=plans())
@settings(max_examples=100, deadline=None)
def test_round_trip(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("p") / "plan.json"
    save_plan(plan, path)
    assert load_plan(path) == plan
    assert plan_text(load_plan(path)) == path.read_text()


@given(plan=plans(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_mutation_is_refused_or_a_whole_plan(
    plan: Plan, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(plan_text(plan).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("p") / "plan.json"
    path.write_bytes(raw)
    try:
        read = load_plan(path)
    except GemcutError:
        return
    for one in read.layers.values():
        assert sorted((*one.keep, *one.drop)) == list(range(read.units))
