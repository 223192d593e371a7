"""Tiny float32 checkpoints with both kinds of attention, and a corpus for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.ablate.plain import SHAPE, SIZES, make_corpus
from tests.tiny import make_tiny

from gemcut.stream.corpus import Corpus


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ablate")
    return {kind: make_tiny(root / kind, kind, dtype="float32", **SHAPE) for kind in ("dense", "moe")}


@pytest.fixture(scope="session")
def corpus(folders: dict[str, Path]) -> Corpus:
    """Eight items of three classes, lengths on both sides of the sliding window, one with a single predicted token."""
    return make_corpus(folders["dense"], SIZES)
