from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.score.synthetic_stats import make_statistics, write_statistics

from gemcut.errors import CheckpointError, GemcutError, UsageError
from gemcut.records import load_statistics, load_statistics_index
from gemcut.store import sha256_file
from gemcut.types import EXPERT_MAXIMA, EXPERT_SUMS, QUESTION_SUMS, Statistics


@pytest.fixture
def stats() -> Statistics:
    return make_statistics(np.random.default_rng(1))


@pytest.fixture
def folder(stats: Statistics, tmp_path: Path) -> Path:
    write_statistics(stats, tmp_path / "s")
    return tmp_path / "s"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "statistics.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_layer(folder: Path, layer: int, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change a layer file and record its new hash, as a broken writer would."""
    path = folder / f"layer-{layer:03}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda v: v["layers"][layer].update(sha256=sha256_file(path)))


def test_round_trip_is_exact(folder: Path, stats: Statistics) -> None:
    read = load_statistics(folder)
    assert read.meta == stats.meta
    assert read.fingerprint == stats.fingerprint
    for name in (*EXPERT_SUMS, *EXPERT_MAXIMA):
        assert read.by_class[name].dtype == np.float64
        np.testing.assert_array_equal(read.by_class[name], stats.by_class[name])
    for name in QUESTION_SUMS:
        assert read.by_question[name].dtype == np.float32
        np.testing.assert_array_equal(read.by_question[name], stats.by_question[name])


def test_the_index_alone_needs_no_layer(folder: Path, stats: Statistics) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert load_statistics_index(folder).meta == stats.meta


def test_a_dense_model_has_no_expert_layers(tmp_path: Path, stats: Statistics) -> None:
    write_statistics(stats, tmp_path / "s")
    edit(tmp_path / "s", lambda v: v["meta"].update(layers=[], experts=0, top_k=0))
    read = load_statistics(tmp_path / "s")
    assert read.by_class["n"].shape == (3, 0, 0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no statistics"):
        load_statistics(tmp_path / "none")


def test_missing_layer(folder: Path) -> None:
    (folder / "layer-001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="layer 1"):
        load_statistics(folder)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_layer(folder: Path, keep: float) -> None:
    path = folder / "layer-001.safetensors"
    data = path.read_bytes()
    cut = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:cut])
    for check_hashes in (True, False):
        with pytest.raises(CheckpointError, match="layer 1"):
            load_statistics(folder, check_hashes=check_hashes)


def test_swapped_layers(folder: Path) -> None:
    a, b = folder / "layer-000.safetensors", folder / "layer-001.safetensors"
    shutil.move(a, folder / "x")
    shutil.move(b, a)
    shutil.move(folder / "x", b)
    with pytest.raises(CheckpointError, match="not what was recorded"):
        load_statistics(folder)


def test_a_layer_of_another_run(folder: Path, tmp_path: Path) -> None:
    write_statistics(make_statistics(np.random.default_rng(2)), tmp_path / "t")
    shutil.copy(tmp_path / "t" / "layer-002.safetensors", folder / "layer-002.safetensors")
    with pytest.raises(CheckpointError, match="layer 2"):
        load_statistics(folder)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("experts.by_class.n", np.nan),
        ("experts.by_class.n", -1.0),
        ("experts.by_class.f_max", -0.5),
        ("experts.by_class.gf", np.inf),
        ("experts.by_question.gf", np.nan),
        ("experts.by_question.n", -2.0),
    ],
)
def test_impossible_values(folder: Path, tensor: str, value: float) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[tensor][1, 3] = value

    rewrite_layer(folder, 1, change)
    with pytest.raises(CheckpointError, match=r"(?s)impossible.*layer 1.*expert 3"):
        load_statistics(folder)


def test_counts_that_do_not_add_up(folder: Path) -> None:
    def lose_a_token(tensors: dict[str, np.ndarray]) -> None:
        tensors["experts.by_class.n"][2, int(tensors["experts.by_class.n"][2].argmax())] -= 1

    rewrite_layer(folder, 1, lose_a_token)
    with pytest.raises(CheckpointError, match=r"(?s)do not add up.*layer 1, class 'prose'"):
        load_statistics(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("experts.by_class.easy"),
        lambda t: t.update({"experts.by_class.n": t["experts.by_class.n"].astype(np.float32)}),
        lambda t: t.update({"experts.by_class.n": np.zeros((3, 7))}),
        lambda t: t.update({"experts.by_question.n": np.zeros((11, 8), np.float32)}),
    ],
)
def test_another_form(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    rewrite_layer(folder, 0, change)
    with pytest.raises(CheckpointError, match="layer 0"):
        load_statistics(folder)


@pytest.mark.parametrize("name", ["../s/layer-000.safetensors", "/etc/passwd", "a\\b", "", ".", "..", "a/b", "x\n"])
def test_file_names_are_hostile(folder: Path, name: str) -> None:
    edit(folder, lambda v: v["layers"][0].update(file=name))
    with pytest.raises(CheckpointError, match="plain file name"):
        load_statistics(folder)


@pytest.mark.parametrize(("schema", "word"), [(0, "older"), (2, "newer")])
def test_other_schemas_are_refused_by_name(folder: Path, schema: int, word: str) -> None:
    edit(folder, lambda v: v.update(schema=schema))
    with pytest.raises(CheckpointError, match=f"statistics was written by an? {word} gemcut"):
        load_statistics(folder)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda v: v["meta"].update(experts="8"), "meta.experts"),
        (lambda v: v["meta"].update(experts=True), "meta.experts"),
        (lambda v: v["meta"].update(experts=2**40), "meta.experts"),
        (lambda v: v["meta"].update(experts=60000), "layer 0"),
        (lambda v: v["meta"].update(top_k=9), "meta.top_k"),
        (lambda v: v["meta"].update(layers=[0, 1, 2, 3]), "layers"),
        (lambda v: v["meta"].update(layers=[2, 1, 0]), "meta.layers"),
        (lambda v: v["meta"]["questions"][4].update(cls="poetry"), r"meta.questions\[4\].cls"),
        (lambda v: v["meta"]["questions"][4].update(weight=-1), r"meta.questions\[4\].weight"),
        (lambda v: v["meta"]["questions"][4].update(weight=float("nan")), r"meta.questions\[4\].weight"),
        (lambda v: v["meta"].update(classes=["code", "code", "prose"]), r"meta.classes\[1\]"),
        (lambda v: v["meta"].pop("bos_policy"), "meta.bos_policy"),
        (lambda v: v["meta"].update(extra=1), "meta.extra"),
        (lambda v: v["layers"].append(v["layers"][0]), "layers"),
        (lambda v: v.update(fingerprint="x"), "fingerprint"),
    ],
)
def test_wrong_index(folder: Path, change: Callable[[dict[str, Any]], None], path: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=path):
        load_statistics(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mutation_of_the_index_is_refused_or_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")
    write_statistics(make_statistics(np.random.default_rng(1), L=1, Q=4), folder)
    raw = bytearray((folder / "statistics.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    (folder / "statistics.json").write_bytes(raw)
    with contextlib.suppress(GemcutError):
        load_statistics(folder)
