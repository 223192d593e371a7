"""`plan.json`: made by gemcut or by hand, diffable line by line, validated as if it came from a stranger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from gemcut.errors import UsageError
from gemcut.records.fields import Fields, open_record, to_json
from gemcut.store import refuse_existing, write_bytes
from gemcut.types import Json, Kind, LayerPlan, Plan

PLAN_SCHEMA = 1
BY_HAND = "edited by hand"
MAX_UNITS = 1 << 16  # experts or heads of one layer; a bound, so that a hostile number allocates nothing
MAX_LAYERS = 1 << 12
_KINDS = ("experts", "heads")


def save_plan(plan: Plan, path: Path, *, force: bool = False) -> None:
    """Write `plan.json`: one line per layer's keep list, one line per dropped unit.

    Raises:
        UsageError: `path` exists and `force` is not given, or the plan itself is inconsistent.
    """
    refuse_existing(path, force=force)
    for layer, one in plan.layers.items():
        both = sorted((*one.keep, *one.drop))
        if both != list(range(plan.units)) or list(one.keep) != sorted(one.keep):
            raise UsageError(
                "the plan does not name every unit exactly once",
                where=f"layer {layer}",
                got=f"{len(one.keep)} kept and {len(one.drop)} dropped",
                wanted=f"{plan.units} units, kept ones ascending",
            )
    write_bytes(path, plan_text(plan).encode())


def plan_text(plan: Plan) -> str:
    """The text of `plan.json`."""
    head: Mapping[str, object] = {
        "schema": PLAN_SCHEMA,
        "kind": plan.kind,
        "model": plan.model_fingerprint,
        "units": plan.units,
        "criterion": plan.criterion,
        "params": to_json(plan.params),
        "corpus": plan.corpus_hash,
        "statistics": plan.statistics_fingerprint,
    }
    lines = [f"  {_dump(key)}: {_dump(value)}," for key, value in head.items()]
    layers = [_layer_text(layer, plan.layers[layer]) for layer in sorted(plan.layers)]
    return "{\n" + "\n".join(lines) + '\n  "layers": {\n' + ",\n".join(layers) + "\n  }\n}\n"


def _layer_text(layer: int, one: LayerPlan) -> str:
    keep = ", ".join(str(u) for u in one.keep)
    drop = ",\n".join(f"        {_dump(str(u))}: {_dump(one.drop[u])}" for u in sorted(one.drop))
    drop = "{\n" + drop + "\n      }" if drop else "{}"
    return f'    "{layer}": {{\n      "keep": [{keep}],\n      "drop": {drop}\n    }}'


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def load_plan(path: Path) -> Plan:
    """Read a plan. A layer that names only what it keeps, or only what it drops, is completed.

    Raises:
        UsageError: there is no such file.
        CheckpointError: wrong types, ids out of range or twice, kept and dropped at once, or forgotten.
    """
    f = open_record(path, "plan", PLAN_SCHEMA)
    kind = f.text("kind")
    if kind not in _KINDS:
        f.refuse("kind", kind, " or ".join(_KINDS))
    units = f.count("units", 1, MAX_UNITS)
    layers = f.child("layers")
    keys = layers.names()
    if not 1 <= len(keys) <= MAX_LAYERS:
        f.refuse("layers", f"{len(keys)} layers", f"1 to {MAX_LAYERS} layers")
    read = {layers.number_key(key, MAX_LAYERS - 1): _read_layer(layers.child(key), units) for key in keys}
    plan = Plan(
        kind=cast(Kind, kind),
        model_fingerprint=f.text("model", empty=False),
        units=units,
        layers=dict(sorted(read.items())),
        criterion=f.text("criterion", "hand"),
        params=f.mapping("params"),
        corpus_hash=f.text("corpus", ""),
        statistics_fingerprint=f.text("statistics", ""),
    )
    f.done()
    return plan


def _read_layer(f: Fields, units: int) -> LayerPlan:
    keep = set(f.counts("keep", units - 1, distinct=True)) if f.has("keep") else None
    drop = _read_drop(f, units) if f.has("drop") else None
    f.done()
    if keep is None and drop is None:
        f.refuse("", "neither keep nor drop", "at least one of them")
    if keep is None and drop is not None:
        keep = set(range(units)) - drop.keys()
    elif drop is None and keep is not None:
        drop = dict.fromkeys(sorted(set(range(units)) - keep), BY_HAND)
    assert keep is not None
    assert drop is not None
    if both := sorted(keep & drop.keys()):
        f.refuse("keep", f"unit {both[0]}, which is dropped too", "every unit either kept or dropped")
    if len(keep) + len(drop) != units:
        missing = next(u for u in range(units) if u not in keep and u not in drop)
        f.refuse("", f"nothing about unit {missing}", f"all {units} units kept or dropped")
    if not keep:
        f.refuse("keep", "no unit", "at least one unit that stays")
    return LayerPlan(keep=tuple(sorted(keep)), drop=drop)


def _read_drop(f: Fields, units: int) -> dict[int, str]:
    value: Json = f.raw("drop")
    if isinstance(value, list):
        return dict.fromkeys(sorted(f.counts("drop", units - 1, distinct=True)), BY_HAND)
    drop = f.child("drop")
    read = {drop.number_key(key, units - 1): drop.text(key) for key in drop.names()}
    return dict(sorted(read.items()))
