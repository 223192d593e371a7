"""Observing two corpora and merging is observing their union."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.observe.conftest import corpus_of, make_corpus

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.observe.merge import merge, merge_meta
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from gemcut.records.statistics import load_statistics

Tiny = Callable[[str], Checkpoint]
SETTINGS = ObserveSettings(dtype="float32", batch_tokens=64)


@pytest.fixture(scope="module")
def parts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two halves with an even number of items (so that the parity of an index stays), and the whole."""
    root, whole = tmp_path_factory.mktemp("merge"), make_corpus(8)
    a, b = corpus_of(whole.items[:4]), corpus_of(whole.items[4:5] + whole.items[5:])
    return (
        observe(tiny("moe"), a, root / "a", settings=SETTINGS),
        observe(tiny("moe"), b, root / "b", settings=SETTINGS),
        observe(tiny("moe"), whole, root / "whole", settings=SETTINGS),
    )


def test_folders_add_up(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, whole = parts
    out = merge([a, b], tmp_path / "both")
    found, wanted = load_statistics(out), load_statistics(whole)
    assert found.meta.questions == wanted.meta.questions
    assert found.meta.classes == wanted.meta.classes
    for i in range(6):
        x, y = (load_file(f / f"layer-{i:03d}.safetensors") for f in (out, whole))
        assert x.keys() == y.keys()
        for name in x:
            scale = np.abs(y[name]).max(initial=0.0)
            np.testing.assert_allclose(x[name], y[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_three_parts_are_two_and_one(tiny: Tiny, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, _ = parts
    c = observe(tiny("moe"), make_corpus(2, seed=9, prefix="more"), tmp_path / "c", settings=SETTINGS)
    at_once = load_statistics(merge([a, b, c], tmp_path / "at-once"))
    in_turn = load_statistics(merge([merge([a, b], tmp_path / "two"), c], tmp_path / "in-turn"))
    assert at_once.meta == in_turn.meta
    for name, value in in_turn.by_class.items():
        assert (at_once.by_class[name] == value).all(), name
    for i in range(6):
        x, y = (load_file(tmp_path / f / f"layer-{i:03d}.safetensors") for f in ("at-once", "in-turn"))
        assert all((x[name] == y[name]).all() for name in y)
    with pytest.raises(UsageError, match="two observations are needed"):
        merge([a], tmp_path / "alone")


def test_the_same_question_twice_is_refused(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="questions are in both"):
        merge([parts[0], parts[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["dtype", "model_fingerprint", "template_hash", "bos_policy", "experts", "stack"])
def test_what_differs_is_named(parts: tuple[Path, Path, Path], field: str) -> None:
    a, b = load_statistics(parts[0]).meta, load_statistics(parts[1]).meta
    other = {"experts": 9, "stack": {"torch": "0"}}.get(field, "other")
    with pytest.raises(UsageError, match=f"different {field}"):
        merge_meta(a, replace(b, **{field: other}))  # type: ignore[arg-type]


def test_a_damaged_part_is_refused(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import shutil

    bad = shutil.copytree(parts[0], tmp_path / "bad")
    path = bad / "layer-002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="layer 2"):
        merge([bad, parts[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
