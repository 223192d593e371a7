"""Tiny models, observed for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.export.imatrix.small import layout_of
from tests.observe.conftest import make_corpus
from tests.tiny import make_tiny

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.families.gguf import GgufLayout


@dataclass(frozen=True)
class Observed:
    checkpoint: Checkpoint
    folder: Path
    layout: GgufLayout


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Observed]:
    """A tiny model of this kind and its statistics."""
    from gemcut.observe.run import observe

    root = tmp_path_factory.mktemp("observed")
    made: dict[str, Observed] = {}

    def get(kind: str) -> Observed:
        if kind not in made:
            checkpoint = open_checkpoint(make_tiny(root / kind, kind))  # type: ignore[arg-type]
            folder = observe(checkpoint, make_corpus(12), root / f"stats-{kind}")
            made[kind] = Observed(checkpoint, folder, layout_of(checkpoint))
        return made[kind]

    return get
