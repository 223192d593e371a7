"""An edited checkpoint reads what the written one would hold, for any range and any edit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gemcut.checkpoint import edited as module
from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.edited import edited_checkpoint
from gemcut.checkpoint.header import read_header
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError
from gemcut.types import Edit, Mask, Omit, Rename, Replace, Take

SHAPE = (6, 5, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("edited")
    rng = np.random.default_rng(0)
    save_file({n: rng.standard_normal(SHAPE).astype(np.float16) for n in ("a", "b")}, folder / "model.safetensors")
    save_file({"c": rng.standard_normal(SHAPE).astype(np.float16)}, folder / "other")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Any"]}))
    return open_checkpoint(folder, any_architecture=True)


def values(base: Checkpoint, name: str = "a") -> np.ndarray:
    return np.frombuffer(base.read(name), np.float16).reshape(SHAPE)


@settings(max_examples=200, deadline=None)
@given(
    axis=st.integers(0, 2),
    data=st.data(),
    kind=st.sampled_from(["take", "mask", "replace"]),
    row_bytes=st.sampled_from([0, 1 << 20]),
)
def test_any_range_of_any_edit(base: Checkpoint, axis: int, data: st.DataObject, kind: str, row_bytes: int) -> None:
    index = tuple(sorted(data.draw(st.sets(st.integers(0, SHAPE[axis] - 1), min_size=1))))
    edit: Edit = Take(axis, index)
    wanted = np.take(values(base), index, axis)
    if kind == "mask":
        edit = Mask(axis, index)
        wanted = values(base).copy()
        wanted[(slice(None),) * axis + (list(index),)] = 0
    elif kind == "replace":
        other = read_header(base.path / "other", "other").tensors[0]
        edit = Replace(base.path / "other", other, Take(axis, index))
        stored = np.frombuffer((base.path / "other").read_bytes()[other.start : other.stop], np.float16)
        wanted = np.take(stored.reshape(SHAPE), index, axis)
    found = edited_checkpoint(base, {"a": edit}, base.config)
    raw = wanted.tobytes()
    assert found.ref("a").shape == wanted.shape
    assert found.ref("a").size_bytes == len(raw)
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, len(raw)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROW_BYTES", row_bytes)  # both ways of reading
        assert found.read_range("a", start, stop).tobytes() == raw[start:stop]
        assert found.read("b").tobytes() == base.read("b").tobytes()


def test_left_out_and_renamed(base: Checkpoint) -> None:
    found = edited_checkpoint(base, {"a": Omit(), "b": Rename("d")}, base.config)
    assert list(found.tensors) == ["d"]
    assert found.read("d").tobytes() == base.read("b").tobytes()


def test_fingerprints_differ_by_edit_config_and_replaced_bytes(base: Checkpoint, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes((base.path / "other").read_bytes())
    ref = read_header(other, "other").tensors[0]
    takes = [{"a": Take(0, (0, 1))}, {"a": Take(0, (0, 2))}, {"a": Mask(0, (0, 1))}, {"a": Replace(other, ref)}, {}]
    prints = [edited_checkpoint(base, edits, base.config).fingerprint for edits in takes]
    prints.append(edited_checkpoint(base, {}, {"architectures": ["Other"]}).fingerprint)
    raw = bytearray(other.read_bytes())
    raw[-1] ^= 1
    other.write_bytes(raw)
    prints.append(edited_checkpoint(base, {"a": Replace(other, ref)}, base.config).fingerprint)
    assert len({*prints, base.fingerprint}) == len(prints) + 1
    assert prints[0] == edited_checkpoint(base, takes[0], base.config).fingerprint


def test_refusals(base: Checkpoint) -> None:
    for edits in ({"z": Omit()}, {"a": Take(0, (9,))}, {"a": Rename("b")}):
        with pytest.raises(CheckpointError):
            edited_checkpoint(base, edits, base.config)
    found = edited_checkpoint(base, {"a": Take(0, (1,))}, base.config)
    with pytest.raises(CheckpointError, match="outside"):
        found.read_range("a", 0, base.ref("a").size_bytes)
