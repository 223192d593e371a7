"""Texts of the demo corpora that the figures are measured on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gemcut.stream.corpus import Corpus, load_corpus

DEMO = Path(__file__).resolve().parent.parent / "demo"
CALIBRATION = DEMO / "corpus" / "calibration.jsonl"
HELD_OUT = DEMO / "corpus" / "heldout.jsonl"
LOOKED_AT = 16000  # tokens of the held-out corpus that were looked at while defaults were chosen


def unseen(base: Path, tokens: int) -> Corpus:
    """Held-out items that nobody looked at, classes in turn, up to so many tokens."""
    seen = {row.id for row in load_corpus(HELD_OUT, base, max_tokens=LOOKED_AT).items}
    every = load_corpus(HELD_OUT, base)
    queues = {cls: [row for row in every.items if row.cls == cls and row.id not in seen] for cls in every.classes}
    taken, room = [], tokens
    while any(queues.values()):
        for cls, queue in queues.items():
            if queue and len(queue[0].ids) <= room:
                room -= len(queue[0].ids)
                taken.append(queue.pop(0))
            else:
                queues[cls] = []
    return dataclasses.replace(every, items=tuple(taken))
