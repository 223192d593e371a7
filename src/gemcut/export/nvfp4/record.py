"""nvfp4.json: what an NVFP4 checkpoint was made of and what became of every module. No path, no host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from gemcut.nvfp4.choices import KvCache, Layout, Method, Scheme
from gemcut.types import Json

RECORD = "nvfp4.json"
CONVERTED = "converted_from"  # the layout that a converted folder had
FORMAT, SCHEMA = "gemcut nvfp4", 1
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Origin:
    """What was asked for.   statistics, corpus: hashes of what the activations' scales and weights come from."""

    parent: str  # fingerprint of the checkpoint that was quantised
    scheme: Scheme
    layout: Layout
    targets: str
    scales: Method
    activations: str
    kv: KvCache
    statistics: str
    corpus: str


def record_json(
    origin: Origin,
    modules: Mapping[str, Mapping[str, float | None]],
    left: Mapping[str, str],
    borrowed: Sequence[str],
    ignore: Sequence[str],
) -> dict[str, Json]:
    """The record.

    Args:
        modules: linear → its numbers.   left: linear → why it stays, of those that were targeted.
        borrowed: linears of experts that saw too little text and have their peers' activation scales and weights.
    """
    rounded: dict[str, Json] = {
        name: {key: None if value is None else float(f"{value:.{_DIGITS}g}") for key, value in numbers.items()}
        for name, numbers in modules.items()
    }
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        **asdict(origin),
        "ignore": list(ignore),
        "left": dict(left),
        "borrowed": list(borrowed),
        "modules": rounded,
    }
