"""What the tests of the heal share: a corpus long enough for the rank guard, and plans of heads."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.stream.corpus import Corpus, Row
from gemcut.types import LayerPlan, Plan


def make_corpus(items: int = 48, seed: int = 0) -> Corpus:
    """Random token ids of the tiny checkpoints' vocabulary, BOS first, three classes, 3 to 40 tokens an item."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(items):
        ids = np.concatenate([[2], rng.integers(10, 300, int(rng.integers(2, 40)))]).astype(np.int64)
        rows.append(Row(f"q{i}", ("code", "math", "story")[i % 3], ids, 1.0))
    digest = hashlib.sha256(b"".join(row.id.encode() + row.ids.tobytes() for row in rows)).hexdigest()
    return Corpus(tuple(rows), digest, "b" * 64, "c" * 64, "text: added", 4096, 0, ("code", "math", "story"))


def head_plan(base: Checkpoint, drop: dict[int, Collection[int]]) -> Plan:
    units = next(site.units for site in base.sites if site.kind == "heads")
    layers = {
        layer: LayerPlan(tuple(u for u in range(units) if u not in gone), dict.fromkeys(sorted(gone), "by hand"))
        for layer, gone in drop.items()
    }
    return Plan("heads", base.fingerprint, units, layers)
