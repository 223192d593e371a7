"""A small corpus with three classes and lengths on both sides of the sliding window, and tiny checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import make_tiny

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.stream.corpus import Corpus, Row


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_corpus(items: int = 9, seed: int = 0, prefix: str = "q", longest: int = 40) -> Corpus:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(items):
        ids = np.concatenate([[2], rng.integers(10, 300, int(rng.integers(2, longest)))]).astype(np.int64)
        rows.append(Row(f"{prefix}{i}", ("code", "math", "story")[i % 3], ids, 1.0))
    return corpus_of(tuple(rows))


def corpus_of(rows: tuple[Row, ...]) -> Corpus:
    digest = hashlib.sha256(b"".join(row.id.encode() + row.ids.tobytes() for row in rows)).hexdigest()
    classes = tuple(sorted({row.cls for row in rows}))
    return Corpus(rows, digest, "b" * 64, "c" * 64, "text: added", 4096, 0, classes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            made[kind] = make_tiny(root / kind, kind)  # type: ignore[arg-type]
        return open_checkpoint(made[kind])

    return get
