from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.curvature import CURVATURE_FILE, Curvature, Margins, load_curvature, save_curvature
from gemcut.store import sha256_file

VALUES = "curvature.safetensors"


def make() -> Curvature:
    dense = Margins(np.array([[1.0, 2.0]]), np.array([[0.5, 1.5, 1.0]]))
    experts = Margins(np.ones((4, 2)), np.full((4, 1), 2.0))
    return Curvature({"a.weight": dense, "experts.down": experts}, 120, 2, 5, "float32", 7, "m" * 64, "c" * 64)


def test_round_trip(tmp_path: Path) -> None:
    made = make()
    save_curvature(made, tmp_path / "c")
    read = load_curvature(tmp_path / "c")
    assert (read.tokens, read.draws, read.items, read.dtype, read.seed) == (120, 2, 5, "float32", 7)
    assert (read.model_fingerprint, read.corpus_hash) == ("m" * 64, "c" * 64)
    assert set(read.tensors) == set(made.tensors)
    for name, one in made.tensors.items():
        np.testing.assert_array_equal(read.tensors[name].rows, one.rows)
        np.testing.assert_array_equal(read.tensors[name].columns, one.columns)
    assert len(read.fingerprint) == 64
    with pytest.raises(UsageError, match="exists already"):
        save_curvature(made, tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("a.weight.rows", np.array([[1.0, np.nan]]), "no numbers"),
        ("a.weight.rows", np.array([[1.0, -1.0]]), "negative"),
        ("a.weight.rows", np.ones((2, 2)), "other forms"),
        ("a.weight.rows", np.ones(2), "another form"),
        ("a.weight.rows", np.ones((1, 2), np.float32), "another form"),
        ("a.weight.rows", None, "columns without rows"),
        ("b.weight", np.ones((1, 1)), "columns without rows"),
    ],
)
def test_damaged_values_are_refused(tmp_path: Path, name: str, values: np.ndarray | None, said: str) -> None:
    save_curvature(make(), tmp_path / "c")
    arrays = load_file(tmp_path / "c" / VALUES)
    if values is None:
        del arrays[name]
    else:
        arrays[name] = values
    save_file(arrays, tmp_path / "c" / VALUES)
    with pytest.raises(CheckpointError, match="not what was recorded"):
        load_curvature(tmp_path / "c")
    record = json.loads((tmp_path / "c" / CURVATURE_FILE).read_text())
    record["values_sha256"] = sha256_file(tmp_path / "c" / VALUES)
    (tmp_path / "c" / CURVATURE_FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=said):
        load_curvature(tmp_path / "c")


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"tokens": 0}, {"tokens": 1.5}, {"model": ""}, {"more": 1}, {"values_sha256": "x"}]
)
def test_damaged_records_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    save_curvature(make(), tmp_path / "c")
    record = json.loads((tmp_path / "c" / CURVATURE_FILE).read_text())
    (tmp_path / "c" / CURVATURE_FILE).write_text(json.dumps(record | change))
    with pytest.raises(CheckpointError):
        load_curvature(tmp_path / "c")


def test_there_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        load_curvature(tmp_path / "none")
