"""What every bench answers with: lines of docs/bench.md, each with its target and what was measured.

A bench prints one JSON object with `--json`, its lines under "rows"; without, the lines to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from gemcut.types import Estimate

Line: TypeAlias = dict[str, str]


def row(what: str, target: str, measured: str) -> Line:
    """One line. target is "" where a figure is only told."""
    return {"what": what, "target": target, "measured": measured}


def interval(one: Estimate) -> dict[str, float]:
    """An estimate as JSON."""
    return {"value": one.value, "low": one.low, "high": one.high, "n": one.n}


def spell(one: Mapping[str, float], form: str = ".3f", unit: str = "") -> str:
    """An estimate as JSON, as words: `0.915 [0.894, 0.933]`."""
    return f"{one['value']:{form}}{unit} [{one['low']:{form}}, {one['high']:{form}}]"


def load_average() -> float:
    """Processes that wanted a core in the last five minutes: above the number of cores, seconds say little."""
    return round(os.getloadavg()[1], 1)


def show(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the answer of a bench."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for one in found["rows"]:
        target = f"\n  target    {one['target']}" if one["target"] else ""
        print(f"{one['what']}{target}\n  measured  {one['measured']}")
