from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.records.importance import IMPORTANCE_FILE, load_importance, save_importance
from gemcut.types import HeadImportance

TEXTS = ("method", "layers", "classes", "model_fingerprint", "corpus_hash", "template_hash", "dtype", "tokens", "items")


def make(**over: Any) -> HeadImportance:
    fields: dict[str, Any] = {
        "method": "loo",
        "layers": (1, 4),
        "values": np.array([[0.1, -0.2, 0.0], [1 / 3, 1e-300, 7.0]]),
        "stderr": np.full((2, 3), 0.01),
        "classes": ("a", "b"),
        "per_class": np.arange(12.0).reshape(2, 2, 3),
        "model_fingerprint": "m",
        "corpus_hash": "c",
        "template_hash": "t",
        "dtype": "float32",
        "tokens": 90,
        "items": 9,
    }
    return HeadImportance(**(fields | over))


@pytest.mark.parametrize("over", [{}, {"stderr": None, "method": "taylor", "items": 1}])
def test_round_trip(tmp_path: Path, over: dict[str, Any]) -> None:
    made = make(**over)
    save_importance(made, tmp_path / "i")
    read = load_importance(tmp_path / "i")
    for name in TEXTS:
        assert getattr(read, name) == getattr(made, name)
    np.testing.assert_array_equal(read.values, made.values)
    np.testing.assert_array_equal(read.per_class, made.per_class)
    if made.stderr is None:
        assert read.stderr is None
    else:
        np.testing.assert_array_equal(read.stderr, made.stderr)
    with pytest.raises(UsageError, match="exists already"):
        save_importance(made, tmp_path / "i")
    save_importance(make(tokens=91), tmp_path / "i", force=True)
    assert load_importance(tmp_path / "i").tokens == 91


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"values": np.array([[0.1, np.nan, 0.0], [1, 2, 3]])}, "layer 1, head 1"),
        ({"stderr": np.full((2, 3), np.inf)}, "not finite"),
        ({"stderr": np.ones((3, 2))}, "another shape"),
        ({"per_class": np.ones((1, 2, 3))}, "another shape"),
        ({"layers": (1, 4, 5)}, "another shape"),
    ],
)
def test_what_cannot_be_importance_is_never_made(over: dict[str, Any], said: str) -> None:
    with pytest.raises(QualityError, match=said):
        make(**over)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("schema", 2, "newer gemcut"),
        ("method", "norm", "method"),
        ("layers", [4, 1], "layers"),
        ("layers", [1, 1], r"layers\[1\]"),
        ("layers", [], "layers"),
        ("units", 4, "another form"),
        ("units", True, "units"),
        ("classes", ["a"], "another form"),
        ("tokens", 0, "tokens"),
        ("items", "9", "items"),
        ("model", "", "model"),
        ("values_sha256", "0" * 64, "not what was recorded"),
        ("extra", 1, "unknown key"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, key: str, value: object, named: str) -> None:
    save_importance(make(), tmp_path / "i")
    path = tmp_path / "i" / IMPORTANCE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=named):
        load_importance(tmp_path / "i")


def test_values_of_another_run_and_no_folder(tmp_path: Path) -> None:
    save_importance(make(), tmp_path / "a")
    save_importance(make(values=np.ones((2, 3))), tmp_path / "b")
    (tmp_path / "a" / "importance.safetensors").write_bytes((tmp_path / "b" / "importance.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not what was recorded"):
        load_importance(tmp_path / "a")
    (tmp_path / "b" / "importance.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        load_importance(tmp_path / "b")
    with pytest.raises(UsageError, match="no head importance"):
        load_importance(tmp_path / "c")


def test_a_negative_error_is_refused(tmp_path: Path) -> None:
    save_importance(make(stderr=np.full((2, 3), -1.0)), tmp_path / "i")
    with pytest.raises(CheckpointError, match="below zero"):
        load_importance(tmp_path / "i")
