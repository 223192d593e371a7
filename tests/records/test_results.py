from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.records.editing import edited

from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.records import load_kld, load_manifest, load_scores, save_kld, save_manifest, save_scores
from gemcut.records.results import MANIFEST_SCHEMA
from gemcut.types import Estimate, KldResult, KldRow, Manifest, Scores, TensorFact

SHA = "0" * 64
FACT = TensorFact("experts.down_proj", "take", "BF16", (4, 2), (2, 2), SHA, "1" * 64, 0, (0, 3), None)
ADDED = TensorFact("extra", "added", "F32", None, (1,), None, "2" * 64)
MANIFEST = Manifest(
    MANIFEST_SCHEMA,
    "base",
    "new",
    (FACT, ADDED),
    {"text_config.num_experts": (4, 2)},
    {"sub/model.safetensors": SHA},
    100,
    50,
)
E = Estimate(0.1, 0.05, 0.2, 12)
KLD = KldResult(
    "b", "c", "easy_ep 98", "corpus", "template", "float32", 12, 3, (KldRow("all", 9, E, E, E, E, E, 2.0, 2.5),)
)


def test_manifest_round_trip(tmp_path: Path) -> None:
    save_manifest(MANIFEST, tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == MANIFEST


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("schema",), 99, "newer"),
        (("tensors", 0, "found"), "eaten", r"tensors\[0\].found"),
        (("tensors", 0, "index"), [3, 0], r"tensors\[0\].index"),
        (("tensors", 0, "index"), None, r"tensors\[0\].index"),
        (("tensors", 0, "shape_after"), [2, -2], r"tensors\[0\].shape_after\[1\]"),
        (("tensors", 0, "blake3_before"), "abc", "blake3_before"),
        (("tensors", 1, "name"), "experts.down_proj", "second time"),
        (("tensors", 0, "relative_change"), float("inf"), "relative_change"),
        (("config_changes", "x"), [1], "config_changes.x"),
        (("files", "../x"), SHA, "inside the folder"),
        (("files", "/x"), SHA, "inside the folder"),
        (("files", "a\\..\\b"), SHA, "inside the folder"),
        (("files", "C:x"), SHA, "inside the folder"),
        (("size_bytes_after",), 1.5, "size_bytes_after"),
        (("host",), "me", "host"),
    ],
)
def test_wrong_manifest(tmp_path: Path, keys: tuple[Any, ...], value: object, named: str) -> None:
    save_manifest(MANIFEST, tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match=named):
        load_manifest(edited(tmp_path / "manifest.json", keys, value))


def test_kld_round_trip(tmp_path: Path) -> None:
    save_kld(KLD, tmp_path / "kld.json")
    assert load_kld(tmp_path / "kld.json") == KLD


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("rows", 0, "mean", "low"), "0", r"rows\[0\].mean.low"),
        (("rows", 0, "mean", "n"), -1, r"rows\[0\].mean.n"),
        (("rows", 0, "ppl_base"), float("nan"), "ppl_base"),
        (("seed",), None, "seed"),
    ],
)
def test_wrong_kld(tmp_path: Path, keys: tuple[Any, ...], value: object, named: str) -> None:
    save_kld(KLD, tmp_path / "kld.json")
    with pytest.raises(CheckpointError, match=named):
        load_kld(edited(tmp_path / "kld.json", keys, value))


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    bad = KldResult("b", "c", "x", "c", "t", "f", 1, 0, (KldRow("all", 1, E, E, E, E, E, float("inf"), 1.0),))
    with pytest.raises(QualityError, match="not finite"):
        save_kld(bad, tmp_path / "kld.json")
    assert not list(tmp_path.iterdir())


def make_scores(**over: Any) -> Scores:
    fields: dict[str, Any] = {
        "criterion": "class_rank",
        "params": {"weights": {"a": 2.0}},
        "kind": "experts",
        "layers": (1, 4),
        "values": np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 0.5]]),
        "model_fingerprint": "m",
        "statistics_fingerprint": "s",
        "corpus_hash": "c",
        "protected": np.array([[True, False, False], [False, False, True]]),
        "why": "floor",
        "classes": ("a", "b"),
        "per_class": np.arange(12.0).reshape(2, 2, 3),
    }
    return Scores(**(fields | over))


@pytest.mark.parametrize("over", [{}, {"protected": None, "per_class": None, "classes": ()}])
def test_scores_round_trip(tmp_path: Path, over: dict[str, Any]) -> None:
    scores = make_scores(**over)
    save_scores(scores, tmp_path / "s")
    read = load_scores(tmp_path / "s")
    for name in ("criterion", "params", "kind", "layers", "model_fingerprint", "corpus_hash", "why", "classes"):
        assert getattr(read, name) == getattr(scores, name)
    for name in ("values", "protected", "per_class"):
        np.testing.assert_array_equal(getattr(read, name), getattr(scores, name))
    with pytest.raises(UsageError, match="exists already"):
        save_scores(scores, tmp_path / "s")


def test_scores_of_another_run(tmp_path: Path) -> None:
    save_scores(make_scores(), tmp_path / "a")
    save_scores(make_scores(values=np.ones((2, 3))), tmp_path / "b")
    (tmp_path / "a" / "scores.safetensors").write_bytes((tmp_path / "b" / "scores.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not what was recorded"):
        load_scores(tmp_path / "a")


def test_scores_of_another_shape(tmp_path: Path) -> None:
    save_scores(make_scores(), tmp_path / "a")
    with pytest.raises(CheckpointError, match="another form"):
        load_scores(edited(tmp_path / "a" / "scores.json", ("units",), 4).parent)
