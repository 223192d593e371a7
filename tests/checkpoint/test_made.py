"""Tensors that come into a checkpoint: computed while it is written, laid out, indexed, hashed and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from gemcut.checkpoint import Checkpoint, diff, open_checkpoint, verify, write_checkpoint
from gemcut.checkpoint.made import Made, new_tensor
from gemcut.errors import CheckpointError
from gemcut.types import Omit, Rename
from tiny import make_tiny

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
SCALAR = "model.language_model.layers.1.layer_scalar"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path / "base", "dense"))


def made(*arrays: tuple[str, np.ndarray], dtypes: tuple[str, ...], step: int = 7) -> Made:
    """Given out in pieces that do not end where tensors do."""
    raw = b"".join(array.tobytes() for _, array in arrays)

    def fill() -> Iterator[memoryview]:
        for at in range(0, len(raw), step):
            yield memoryview(raw[at : at + step])

    refs = [new_tensor(name, dtype, array.shape) for (name, array), dtype in zip(arrays, dtypes, strict=True)]
    return Made(tuple(refs), fill)


def test_new_tensors_lie_in_the_shard_of_the_one_they_stand_for(base: Checkpoint, tmp_path: Path) -> None:
    scale, codes = np.array([3.5], np.float32), np.arange(48, dtype=np.uint8).reshape(4, 12)
    new = made(("x.scale", scale), ("x.codes", codes), dtypes=("F32", "U8"))
    out = tmp_path / "out"
    seen = []
    report = write_checkpoint(
        base,
        {DOWN: Omit()},
        {**base.config, "quantised": True},
        out,
        made={DOWN: new},
        files=lambda: seen.append("asked") or {"note.txt": b"hello", "chat_template.jinja": b"ours"},
    )
    shard = base.tensors[DOWN].shard
    assert report.edited == (shard,)
    tensors = load_file(out / shard)  # a reader that wants numbers aligned
    np.testing.assert_array_equal(tensors["x.codes"].numpy(), codes)
    assert tensors["x.scale"].tolist() == [3.5]
    assert DOWN not in tensors
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["x.codes"] == shard
    assert DOWN not in index["weight_map"]
    written = open_checkpoint(out, any_architecture=True)
    assert index["metadata"]["total_size"] == written.size_bytes == base.size_bytes - base.tensors[DOWN].size_bytes + 52
    found = {fact.name: fact.found for fact in report.manifest.tensors if fact.found != "same"}
    assert found == {DOWN: "removed", "x.scale": "added", "x.codes": "added"}
    assert (out / "note.txt").read_bytes() == b"hello"
    assert (out / "chat_template.jinja").read_bytes() == b"ours"
    assert seen == ["asked"]
    assert verify(written, base).record_checked  # the record is what another reading finds
    assert diff(base, written).fingerprint == report.manifest.fingerprint


def test_under_the_name_of_the_tensor_that_it_stands_for(base: Checkpoint, tmp_path: Path) -> None:
    codes = np.arange(48, dtype=np.uint8).reshape(4, 12)
    new = made((DOWN, codes), dtypes=("U8",))
    report = write_checkpoint(base, {DOWN: Omit()}, base.config, tmp_path / "out", made={DOWN: new})
    (fact,) = [fact for fact in report.manifest.tensors if fact.found != "same"]
    assert (fact.name, fact.found, fact.dtype, fact.shape_after) == (DOWN, "reshaped", "U8", (4, 12))
    assert verify(open_checkpoint(tmp_path / "out", any_architecture=True), base).record_checked


def test_beside_a_tensor_that_stays(base: Checkpoint, tmp_path: Path) -> None:
    new = made(("y", np.array([1, 2], np.float32)), dtypes=("F32",))
    write_checkpoint(base, {}, base.config, tmp_path / "out", made={SCALAR: new})
    tensors = load_file(tmp_path / "out" / base.tensors[SCALAR].shard)
    assert tensors["y"].tolist() == [1, 2]
    assert SCALAR in tensors


@pytest.mark.parametrize(("size", "what"), [(3, "fewer bytes"), (5, "more bytes")])
def test_bytes_that_do_not_fill_the_tensor(base: Checkpoint, tmp_path: Path, size: int, what: str) -> None:
    wrong = Made((new_tensor("y", "U8", (4,)),), lambda: iter([memoryview(bytes(size))]))
    with pytest.raises(CheckpointError, match=what):
        write_checkpoint(base, {}, base.config, tmp_path / "out", made={SCALAR: wrong})
    assert not (tmp_path / "out").exists()


def test_names_that_are_taken(base: Checkpoint, tmp_path: Path) -> None:
    new = made((DOWN, np.zeros(4, np.uint8)), dtypes=("U8",))
    with pytest.raises(CheckpointError, match="the name of another"):
        write_checkpoint(base, {}, base.config, tmp_path / "out", made={SCALAR: new})
    with pytest.raises(CheckpointError, match="the name of another"):
        write_checkpoint(base, {SCALAR: Rename("z")}, base.config, tmp_path / "out",
                         made={DOWN: made(("z", np.zeros(4, np.uint8)), dtypes=("U8",))})  # fmt: skip
    with pytest.raises(CheckpointError, match="does not exist"):
        write_checkpoint(base, {}, base.config, tmp_path / "out", made={"no.such": new})
