"""Largest keys and values: what was kept is read, what is missing or damaged is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.cache import load_cache_peaks
from gemcut.records.statistics import LayerFile, StatisticsIndex
from gemcut.store import sha256_file
from gemcut.types import StatisticsMeta

META = StatisticsMeta(
    schema=1, model_fingerprint="f", model_name="m", family="gemma4", corpus_hash="c", template_hash="t",
    bos_policy="one", max_tokens_per_item=64, truncated_items=0, dtype="float32", classes=(), questions=(), layers=(),
    experts=0, top_k=0, stack={},
)  # fmt: skip
GOOD = {"cache.k.amax": np.array([1.5, 3.0], np.float32), "cache.v.amax": np.array([4.0, 0.0], np.float32)}


def folder_with(tmp_path: Path, tensors: dict[str, np.ndarray]) -> StatisticsIndex:
    path = tmp_path / "layer-003.safetensors"
    save_file(tensors, path)
    return StatisticsIndex(META, "f", (LayerFile(3, path.name, sha256_file(path)),))


def test_what_was_kept(tmp_path: Path) -> None:
    found = load_cache_peaks(tmp_path, folder_with(tmp_path, GOOD), 3)
    assert found.k.tolist() == [1.5, 3.0]
    assert found.v.tolist() == [4.0, 0.0]


def test_an_older_observation_says_what_to_do(tmp_path: Path) -> None:
    index = folder_with(tmp_path, {"other": np.zeros(1, np.float32)})
    with pytest.raises(UsageError, match="observe again"):
        load_cache_peaks(tmp_path, index, 3)
    with pytest.raises(UsageError, match="no such layer"):
        load_cache_peaks(tmp_path, index, 4)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.update({"cache.k.amax": np.array([1.0, np.nan], np.float32)}), "no size"),
        (lambda t: t.update({"cache.v.amax": np.array([1.0, -1.0], np.float32)}), "no size"),
        (lambda t: t.update({"cache.v.amax": np.ones(3, np.float32)}), "other numbers of heads"),
        (lambda t: t.update({"cache.k.amax": np.ones(2, np.float64)}), "another form"),
    ],
)
def test_damage(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], what: str) -> None:
    tensors = dict(GOOD)
    change(tensors)
    with pytest.raises(CheckpointError, match=what):
        load_cache_peaks(tmp_path, folder_with(tmp_path, tensors), 3)


def test_a_truncated_file(tmp_path: Path) -> None:
    index = folder_with(tmp_path, GOOD)
    path = tmp_path / "layer-003.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_cache_peaks(tmp_path, index, 3)
