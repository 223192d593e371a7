"""What is found in the bytes, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gemcut.checkpoint import diff, open_checkpoint
from gemcut.checkpoint.diff import config_changes
from gemcut.checkpoint.read import SINGLE, Checkpoint
from gemcut.types import TensorFact

RNG = np.random.default_rng(0)


def own_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property: a fixture per example is not to be had."""
    folder = factory.getbasetemp() / __name__.rpartition(".")[2]
    folder.mkdir(exist_ok=True)
    return folder


def folder(path: Path, tensors: dict[str, np.ndarray], config: str = "{}") -> Checkpoint:
    path.mkdir(exist_ok=True)
    # numpy's fancy indexing may leave another memory order, which the writer would store as it is
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path / SINGLE)
    (path / "config.json").write_text(config)
    return open_checkpoint(path, any_architecture=True)


def one(tmp: Path, before: np.ndarray, after: np.ndarray) -> TensorFact:
    manifest = diff(folder(tmp / "a", {"t": before}), folder(tmp / "b", {"t": after}))
    return manifest.tensors[0]


def test_same_though_the_files_differ(tmp_path: Path) -> None:
    x = RNG.standard_normal((50, 60)).astype(np.float32)
    a = folder(tmp_path / "a", {"x": x, "y": x})
    (tmp_path / "b").mkdir()
    save_file({"y": x}, tmp_path / "b" / "1.safetensors")
    save_file({"x": x}, tmp_path / "b" / "2.safetensors")
    index = {"weight_map": {"x": "2.safetensors", "y": "1.safetensors"}}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "b" / "config.json").write_text("{}")
    manifest = diff(a, open_checkpoint(tmp_path / "b", any_architecture=True))
    assert [fact.found for fact in manifest.tensors] == ["same", "same"]
    assert manifest.tensors[0].blake3_before == blake3(x.tobytes()).hexdigest()
    assert set(manifest.files) == {"1.safetensors", "2.safetensors", "config.json", "model.safetensors.index.json"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=3), st.data(), st.sampled_from(["u1", "f4", "f8"]))
def test_any_take_is_found(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject, dtype: str
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = st.sets(st.integers(0, shape[axis] - 1), min_size=1, max_size=shape[axis] - 1)
    index = tuple(sorted(data.draw(size)))
    before = np.random.default_rng(data.draw(st.integers(0, 5))).integers(0, 100, shape).astype(dtype)
    after = np.take(before, index, axis)
    fact = one(own_folder(tmp_path_factory), before, after)
    assert fact.found == "take"
    assert fact.axis is not None
    assert fact.index is not None
    assert np.array_equal(np.take(before, fact.index, fact.axis), after)


def test_large_takes(tmp_path: Path) -> None:
    experts = RNG.integers(0, 2**16, (16, 300, 400)).astype("<u2")
    keep = (0, 2, 3, 7, 11, 15)
    fact = one(tmp_path, experts, experts[list(keep)])
    assert (fact.found, fact.axis, fact.index) == ("take", 0, keep)
    rows = tuple(range(0, 300, 3))
    fact = one(tmp_path, experts, experts[:, list(rows)])
    assert (fact.found, fact.axis, fact.index) == ("take", 1, rows)


def test_a_take_with_one_changed_value_is_not_a_take(tmp_path: Path) -> None:
    x = RNG.integers(0, 2**16, (8, 500, 300)).astype("<u2")
    y = x[[0, 3, 4]].copy()
    y[1, 20, 7] ^= 1
    fact = one(tmp_path, x, y)
    assert fact.found == "reshaped"
    assert fact.blake3_after == blake3(y.tobytes()).hexdigest()
    assert fact.relative_change is None


def test_reordered_units_are_not_a_take(tmp_path: Path) -> None:
    x = RNG.integers(0, 2**16, (8, 9)).astype("<u2")
    assert one(tmp_path, x, x[[4, 0, 3]]).found == "reshaped"


def test_values_mask_added_removed_dtype(tmp_path: Path) -> None:
    x = RNG.standard_normal((40, 64)).astype(np.float32)
    masked = x.copy()
    masked[:, 16:32] = 0
    a = folder(tmp_path / "a", {"v": x, "m": x, "gone": x, "d": x, "s": np.float32([1.0])})
    b = folder(
        tmp_path / "b", {"v": x * 1.01, "m": masked, "new": x, "d": x.astype(np.float16), "s": np.float32([1.0])}
    )
    manifest = diff(a, b)
    facts = {fact.name: fact for fact in manifest.tensors}
    assert {n: f.found for n, f in facts.items()} == {
        "v": "values", "m": "mask", "gone": "removed", "new": "added", "d": "values", "s": "same"
    }  # fmt: skip
    assert facts["v"].relative_change == pytest.approx(0.01, rel=1e-3)
    assert facts["v"].axis is None
    assert (facts["m"].axis, facts["m"].index) == (1, tuple(range(16, 32)))
    assert facts["m"].relative_change == pytest.approx(
        np.linalg.norm(x[:, 16:32].astype(np.float64)) / np.linalg.norm(x.astype(np.float64)), rel=1e-9
    )
    assert facts["d"].relative_change == pytest.approx(0, abs=1e-3)
    assert facts["gone"].shape_after is None
    assert facts["new"].blake3_before is None
    assert manifest.size_bytes_before == a.size_bytes
    assert manifest.size_bytes_after == b.size_bytes
    assert manifest.base_fingerprint == a.fingerprint


def test_config_changes() -> None:
    old = {"a": 1, "t": {"n": 128, "k": [1, 2], "same": None}, "gone": True, "n": 1}
    new = {"a": 1, "t": {"n": 98, "k": [1, 3], "same": None, "new": "x"}, "n": True}
    assert config_changes(old, new) == {
        "t.n": (128, 98), "t.k": ([1, 2], [1, 3]), "t.new": (None, "x"), "gone": (True, None), "n": (1, True)
    }  # fmt: skip
    assert config_changes(old, old) == {}


def test_the_expected_edit_is_checked_and_not_believed(tmp_path: Path) -> None:
    """Of two equal experts the one that was meant is recorded; an edit that the bytes contradict is not."""
    from gemcut.types import Take

    x = RNG.integers(0, 2**16, (4, 30)).astype("<u2")
    x[2] = x[1]
    a, b = folder(tmp_path / "a", {"t": x}), folder(tmp_path / "b", {"t": x[[0, 2]]})
    assert diff(a, b).tensors[0].index == (0, 1)
    assert diff(a, b, expected={"t": Take(0, (0, 2))}).tensors[0].index == (0, 2)
    assert diff(a, b, expected={"t": Take(0, (0, 3))}).tensors[0].index == (0, 1)


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    x = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}
    diff(folder(tmp_path / "a", x), folder(tmp_path / "b", x), progress=lambda *args: seen.append(args))
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2)]
