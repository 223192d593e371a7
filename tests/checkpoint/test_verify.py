"""Bytes against intent and record: every single flipped byte is caught, and named."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import synthetic
from gemcut.checkpoint import open_checkpoint, verify, write_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, GemcutError
from gemcut.types import Edit, Mask, Omit, Replace, Take

SMALL = synthetic.Geometry(
    hidden=32, experts=8, expert_width=8, top_k=2, dense=16, heads=4, kv_heads=2, global_kv_heads=1, head_dim=8,
    global_head_dim=16, vocabulary=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("v") / "base"
    synthetic.write(folder, layers=6, geometry=SMALL, shard_bytes=40_000)
    return open_checkpoint(folder)


def o_proj(layer: int) -> str:
    return f"model.language_model.layers.{layer}.self_attn.o_proj.weight"


EDITS: dict[str, Edit] = {o_proj(layer): Mask(1, tuple(range(8, 16))) for layer in range(3)}


@pytest.fixture(scope="module")
def written(base: Checkpoint) -> Path:
    folder = base.path.with_name("written")
    write_checkpoint(base, EDITS, base.config, folder, link=False)
    return folder


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def stored_elsewhere(path: Path, base: Checkpoint, name: str, values: bytes) -> Replace:
    """New values for a tensor, in a file of their own behind a few other bytes."""
    path.write_bytes(b"\xaa" * 5 + values)
    ref = base.ref(name)
    return Replace(path, replace(ref, name="another name", shard=path.name, start=5, stop=5 + len(values)))


def plainly(base: Checkpoint, folder: Path) -> Checkpoint:
    """The same tensors in a checkpoint that no family watches over, so that one shape may change alone."""
    shutil.copytree(base.path, folder)
    (folder / "config.json").write_text('{"architectures": ["x"]}\n')
    return open_checkpoint(folder, any_architecture=True)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def test_agrees(base: Checkpoint, out: Path) -> None:
    report = verify(open_checkpoint(out), base, edits=EDITS, config=base.config)
    assert report.plan_checked
    assert report.record_checked
    assert report.layers_changed == (0, 1, 2)
    assert report.tensors_changed == 3
    assert report.files_unlisted == ()
    assert report.files_checked == len(list(out.iterdir())) - 2


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_in_a_tensor_is_named(base: Checkpoint, out: Path, seed: int) -> None:
    checkpoint = open_checkpoint(out)
    ref = random.Random(seed).choice(list(checkpoint.tensors.values()))
    flip(out / ref.shard, random.Random(seed).randrange(ref.start, ref.stop))
    with pytest.raises(CheckpointError, match="tensors are not what the record says") as caught:
        verify(open_checkpoint(out), base)
    assert ref.name in str(caught.value)
    assert ref.shard in str(caught.value)
    with pytest.raises(CheckpointError):
        verify(open_checkpoint(out), base, edits=EDITS)


def test_a_flipped_byte_in_every_file_is_caught(base: Checkpoint, out: Path) -> None:
    for path in sorted(out.iterdir()):
        clean = path.read_bytes()
        for at in sorted({0, 5, 9, len(clean) // 2, len(clean) - 1}):
            flip(path, at)
            with pytest.raises(GemcutError):  # a flip in `architectures` is an architecture that no family knows
                verify(open_checkpoint(out), base)
            path.write_bytes(clean)
    verify(open_checkpoint(out), base)


def test_a_changed_byte_of_header_metadata_names_the_file(base: Checkpoint, out: Path) -> None:
    path = next(iter(sorted(out.glob("*.safetensors"))))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"format":"pt"', b'"format":"np"', 1))
    with pytest.raises(CheckpointError, match="files are not what the record says") as caught:
        verify(open_checkpoint(out), base)
    assert path.name in str(caught.value)


def test_fewer_layers_than_planned(base: Checkpoint, out: Path) -> None:
    """A published card once listed 60 healed layers where the bytes differed in 4."""
    planned = {o_proj(layer): Mask(1, tuple(range(8, 16))) for layer in range(6)}
    with pytest.raises(CheckpointError, match="the plan touches 6 layers, bytes differ in 3") as caught:
        verify(open_checkpoint(out), base, edits=planned)
    assert o_proj(3) in str(caught.value)


def test_more_than_planned(base: Checkpoint, out: Path) -> None:
    with pytest.raises(CheckpointError, match="touches 1 layers, bytes differ in 3"):
        verify(open_checkpoint(out), base, edits={o_proj(0): EDITS[o_proj(0)]})


def test_another_index_than_planned(base: Checkpoint, out: Path) -> None:
    with pytest.raises(CheckpointError, match="1 tensors are not as planned"):
        verify(open_checkpoint(out), base, edits={**EDITS, o_proj(1): Mask(1, tuple(range(8)))})


def test_replaced_tensors_hold_the_bytes_that_were_named(base: Checkpoint, tmp_path: Path) -> None:
    name = o_proj(4)
    swap = stored_elsewhere(tmp_path / "healed", base, name, bytes(reversed(base.read(name).tobytes())))
    write_checkpoint(base, {name: swap}, base.config, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    verify(out, base, edits={name: swap})
    with pytest.raises(CheckpointError, match="touches 2 layers, bytes differ in 1"):
        verify(out, base, edits={name: swap, o_proj(5): Mask(1, (0,))})
    with pytest.raises(CheckpointError, match="not as planned"):
        verify(out, base, edits={name: stored_elsewhere(tmp_path / "zeros", base, name, bytes(swap.ref.size_bytes))})
    with pytest.raises(CheckpointError, match="not as planned"):
        verify(out, base, edits={name: replace(swap, then=Take(1, (0, 1)))})


def test_a_replaced_tensor_may_be_taken_from(base: Checkpoint, tmp_path: Path) -> None:
    """A healed projection in a cut that drops the columns: config and shape are the cut's own business."""
    name = o_proj(4)
    values = bytes(reversed(base.read(name).tobytes()))
    swap = replace(stored_elsewhere(tmp_path / "healed", base, name, values), then=Take(1, tuple(range(8, 32))))
    plain = plainly(base, tmp_path / "plain")
    report = write_checkpoint(plain, {name: swap}, plain.config, tmp_path / "out")
    fact = next(f for f in report.manifest.tensors if f.name == name)
    rows, columns = base.ref(name).shape
    wanted = np.frombuffer(values, np.uint16).reshape(rows, columns)[:, 8:32]
    assert (fact.found, fact.shape_after) == ("reshaped", (rows, 24))
    out = open_checkpoint(tmp_path / "out", any_architecture=True)
    assert out.read(name).tobytes() == wanted.tobytes()
    verify(out, plain, edits={name: swap}, config=plain.config)


def test_a_mask_over_zeros_is_as_meant(base: Checkpoint, tmp_path: Path) -> None:
    name = o_proj(0)
    mask = {name: Mask(1, tuple(range(8)))}
    write_checkpoint(base, mask, base.config, tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    write_checkpoint(once, mask, once.config, tmp_path / "twice")
    verify(open_checkpoint(tmp_path / "twice"), once, edits=mask)


def test_config_is_part_of_the_intent(base: Checkpoint, out: Path) -> None:
    meant = {**base.config, "eos_token_id": [1]}
    with pytest.raises(CheckpointError, match=r"config\.json is not what the plan makes of it"):
        verify(open_checkpoint(out), base, edits=EDITS, config=meant)


def test_another_base_is_noticed(out: Path, tmp_path: Path) -> None:
    synthetic.write(tmp_path / "other", layers=6, seed=1, geometry=SMALL, shard_bytes=40_000)
    with pytest.raises(CheckpointError, match="another base"):
        verify(open_checkpoint(out), open_checkpoint(tmp_path / "other"))


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "config.json", "model.safetensors.index.json"])
def test_missing_files(base: Checkpoint, out: Path, name: str) -> None:
    (out / name).unlink()
    with pytest.raises(CheckpointError):
        verify(open_checkpoint(out), base)


def test_without_a_record_the_plan_alone_is_checked(base: Checkpoint, out: Path) -> None:
    (out / "manifest.json").unlink()
    (out / "SHA256SUMS").unlink()
    assert not verify(open_checkpoint(out), base, edits=EDITS).record_checked


def test_a_card_written_later_is_listed_and_no_error(base: Checkpoint, out: Path) -> None:
    (out / "LICENSE").write_text("…")
    assert verify(open_checkpoint(out), base).files_unlisted == ("LICENSE",)


@pytest.mark.parametrize("line", ["nonsense", "0" * 64 + " one-space", "0" * 63 + "  short"])
def test_a_malformed_list_of_hashes(base: Checkpoint, out: Path, line: str) -> None:
    with open(out / "SHA256SUMS", "a") as f:
        f.write(line + "\n")
    with pytest.raises(CheckpointError, match="malformed"):
        verify(open_checkpoint(out), base)


def test_a_manifest_that_lies_is_caught(base: Checkpoint, out: Path) -> None:
    """Even with a matching SHA256SUMS: the facts are recomputed."""
    import hashlib

    manifest = json.loads((out / "manifest.json").read_text())
    fact = next(f for f in manifest["tensors"] if f["found"] == "same")
    fact["found"] = "values"
    (out / "manifest.json").write_text(json.dumps(manifest))
    sums = (out / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    lines = [f"{digest}  manifest.json" if line.endswith("  manifest.json") else line for line in sums]
    (out / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError) as caught:
        verify(open_checkpoint(out), base)
    assert fact["name"] in str(caught.value)


def test_takes_and_omissions(base: Checkpoint, tmp_path: Path) -> None:
    sites = [site for site in base.sites if site.kind == "experts"]
    edits: dict[str, Edit] = {cut.name: Take(0, (0, 2, 3, 7)) for site in sites for cut in site.slices}
    edits["model.language_model.layers.0.self_attn.q_norm.weight"] = Omit()
    config = {**base.config, "text_config": {**base.text_config, "num_experts": 4}}
    write_checkpoint(base, edits, config, tmp_path / "out")
    report = verify(open_checkpoint(tmp_path / "out"), base, edits=edits, config=config)
    assert report.tensors_changed == 25
