"""What is written: shards, order, links, config, index, record; and what is never touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemcut.checkpoint import open_checkpoint, write_checkpoint
from gemcut.checkpoint.read import INDEX, SINGLE, Checkpoint
from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.records import load_manifest
from gemcut.types import Edit, Mask, Omit, Rename, Replace, Take, TensorRef
from tiny import make_tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny(tmp_path_factory.mktemp("tiny") / "moe", "moe")
    (folder / "README.md").write_text("a card\n")
    (folder / "extra" / "deep").mkdir(parents=True)
    (folder / "extra" / "deep" / "notes ü.txt").write_text("notes")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return folder


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(Path(shutil.copytree(original, tmp_path / "base")))


def state(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def some(base: Checkpoint, end: str) -> str:
    return next(name for name in base.tensors if name.endswith(end))


def small(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / SINGLE, metadata=metadata)
    (folder / "config.json").write_text('{"architectures": ["x"]}\n')
    return open_checkpoint(folder, any_architecture=True)


def test_no_edits_gives_the_same_bytes(base: Checkpoint, tmp_path: Path) -> None:
    before = state(base.path)
    report = write_checkpoint(base, {}, base.config, tmp_path / "out")
    after = state(tmp_path / "out")
    assert {k: v for k, v in after.items() if k not in ("manifest.json", "SHA256SUMS")} == before
    assert set(report.linked) == set(base.shards)
    assert report.size_bytes_written == 0
    assert report.manifest.fingerprint == report.manifest.base_fingerprint == base.fingerprint
    assert {fact.found for fact in report.manifest.tensors} == {"same"}
    assert state(base.path) == before


@pytest.mark.parametrize("link", [True, False])
def test_untouched_shards_are_linked_or_copied(base: Checkpoint, tmp_path: Path, link: bool) -> None:
    name = some(base, "layers.5.router.scale")
    edits: dict[str, Edit] = {name: Mask(0, (0,))}
    report = write_checkpoint(base, edits, base.config, tmp_path / "out", link=link)
    changed = base.ref(name).shard
    for shard in base.shards:
        a, b = base.path / shard, tmp_path / "out" / shard
        assert a.samefile(b) == (link and shard != changed)
        assert (a.read_bytes() == b.read_bytes()) == (shard != changed)
    assert report.edited == (changed,)
    assert set(report.linked if link else report.copied) == set(base.shards) - {changed}


def test_sha256sum_agrees(base: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(base, {some(base, "k_norm.weight"): Omit()}, base.config, tmp_path / "out")
    run = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True)
    assert run.returncode == 0, run.stdout
    listed = {line.split("  ", 1)[1] for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()}
    assert listed == state(tmp_path / "out").keys() - {"SHA256SUMS"}


def test_every_edit_against_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    t = {
        name: rng.standard_normal((4, 6, 5)).astype(np.float32)
        for name in ("take", "mask", "omit", "old", "new", "keep")
    }
    base = small(tmp_path / "base", t, {"format": "np", "note": "ü"})
    ones = tmp_path / "ones"
    ones.write_bytes(b"1111" + np.ones((4, 6, 5), np.float32).tobytes())
    edits: dict[str, Edit] = {
        "take": Take(1, (0, 2, 5)), "mask": Mask(2, (1, 3)), "omit": Omit(), "old": Rename("renamed"),
        "new": Replace(ones, TensorRef("1", "F32", (4, 6, 5), ones.name, 4, 484)),
    }  # fmt: skip
    report = write_checkpoint(base, edits, base.config, tmp_path / "out")
    got = load_file(tmp_path / "out" / SINGLE)
    masked = t["mask"].copy()
    masked[:, :, [1, 3]] = 0
    wanted = {
        "take": t["take"][:, [0, 2, 5]],
        "mask": masked,
        "renamed": t["old"],
        "new": np.ones((4, 6, 5)),
        "keep": t["keep"],
    }
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(got[name], value), name
    facts = {fact.name: fact for fact in report.manifest.tensors}
    assert {n: f.found for n, f in facts.items()} == {
        "take": "take", "mask": "mask", "omit": "removed", "old": "removed", "renamed": "added", "new": "values",
        "keep": "same",
    }  # fmt: skip
    assert (facts["take"].axis, facts["take"].index) == (1, (0, 2, 5))
    assert (facts["mask"].axis, facts["mask"].index) == (2, (1, 3))
    norm = np.linalg.norm
    assert facts["new"].relative_change == pytest.approx(norm(1 - t["new"]) / norm(t["new"]), rel=1e-6)
    assert facts["keep"].blake3_after == blake3(t["keep"].tobytes()).hexdigest()
    with safe_open(tmp_path / "out" / SINGLE, "np") as f:
        assert f.metadata() == {"format": "np", "note": "ü"}
    order = [n for n in ("take", "mask", "renamed", "new", "keep") if n in got]
    source = {"renamed": "old"}
    starts = [base.ref(source.get(n, n)).start for n in order]
    written = open_checkpoint(tmp_path / "out", any_architecture=True)
    assert sorted(order, key=lambda n: written.ref(n).start) == [n for _, n in sorted(zip(starts, order, strict=True))]


def test_config_and_index_are_patched_and_nothing_else(base: Checkpoint, tmp_path: Path) -> None:
    index = json.loads((base.path / INDEX).read_text())
    index["metadata"].update(total_parameters=1000, note="kept")
    (base.path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    base = open_checkpoint(base.path)
    name = some(base, "q_norm.weight")
    config = json.loads((base.path / "config.json").read_text())
    config["text_config"]["sliding_window"] = 16
    write_checkpoint(base, {name: Omit()}, config, tmp_path / "out")
    before = (base.path / "config.json").read_text().splitlines()
    after = (tmp_path / "out" / "config.json").read_text().splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [
        ('    "sliding_window": 8,', '    "sliding_window": 16,')
    ]
    new = json.loads((tmp_path / "out" / INDEX).read_text())
    assert list(new["weight_map"]) == [n for n in index["weight_map"] if n != name]
    ref = base.ref(name)
    assert new["metadata"] == {
        "total_size": base.size_bytes - ref.size_bytes, "total_parameters": 1000 - ref.elements, "note": "kept",
    }  # fmt: skip
    changes = load_manifest(tmp_path / "out" / "manifest.json").config_changes
    assert changes == {"text_config.sliding_window": (8, 16)}


def test_a_shard_without_tensors_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for k, name in enumerate(("a", "b")):
        save_file({name: np.ones(3, np.float32)}, tmp_path / "base" / f"{k}.safetensors")
    weight_map = {"a": "0.safetensors", "b": "1.safetensors"}
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "base" / "config.json").write_text("{}")
    base = open_checkpoint(tmp_path / "base", any_architecture=True)
    report = write_checkpoint(base, {"a": Omit()}, {"architectures": ["x"]}, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["1.safetensors"]
    assert {f.name: f.found for f in report.manifest.tensors} == {"a": "removed", "b": "same"}


def test_caches_and_our_own_record_are_not_copied(base: Checkpoint, tmp_path: Path) -> None:
    for name in (
        ".git/config",
        ".cache/x",
        "__pycache__/y.pyc",
        "junk.partial",
        "z.partial/file",
        "manifest.json",
        "SHA256SUMS",
    ):
        (base.path / name).parent.mkdir(exist_ok=True)
        (base.path / name).write_text("stale")
    write_checkpoint(base, {}, base.config, tmp_path / "out")
    names = set(state(tmp_path / "out"))
    assert "stale" not in [(tmp_path / "out" / n).read_text() for n in ("manifest.json", "SHA256SUMS")]
    assert not [n for n in names if n.startswith((".git/", ".cache", "__pycache__")) or "partial" in n]
    assert {".gitattributes", "extra/deep/notes ü.txt", "README.md"} <= names


def test_linked_files_are_copied_as_files(base: Checkpoint, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in [p for p in base.path.iterdir() if p.is_file()]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    write_checkpoint(open_checkpoint(base.path), {}, base.config, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]


def test_strange_things_in_the_folder(base: Checkpoint, tmp_path: Path) -> None:
    (base.path / "dangling").symlink_to(tmp_path / "nope")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        write_checkpoint(base, {}, base.config, tmp_path / "out")
    (base.path / "dangling").unlink()
    (base.path / "loop").symlink_to(base.path)
    with pytest.raises(CheckpointError, match="link to another folder"):
        write_checkpoint(base, {}, base.config, tmp_path / "out")
    (base.path / "loop").unlink()
    os.mkfifo(base.path / "pipe")
    with pytest.raises(CheckpointError, match="not a file"):
        write_checkpoint(base, {}, base.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- outputs


def test_an_existing_output_is_kept_without_force(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_checkpoint(base, {}, base.config, tmp_path / "out")
    assert state(tmp_path / "out").keys() == {"mine"}
    write_checkpoint(base, {}, base.config, tmp_path / "out", force=True)
    assert "mine" not in state(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_input_is_never_the_output(base: Checkpoint, where: str) -> None:
    before = state(base.path)
    with pytest.raises(UsageError, match="one folder"):
        write_checkpoint(base, {}, base.config, base.path / where, force=True)
    assert state(base.path) == before


def test_two_runs_give_the_same_bytes(base: Checkpoint, tmp_path: Path) -> None:
    edits: dict[str, Edit] = {some(base, "experts.down_proj"): Mask(0, (1,)), some(base, "k_norm.weight"): Omit()}
    write_checkpoint(base, edits, base.config, tmp_path / "a")
    write_checkpoint(base, edits, base.config, tmp_path / "b", link=False)
    assert state(tmp_path / "a") == state(tmp_path / "b")


def test_progress_ends_at_the_whole(base: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    edits: dict[str, Edit] = {some(base, "experts.down_proj"): Mask(0, (1,))}
    write_checkpoint(base, edits, base.config, tmp_path / "out", link=False, progress=lambda *a: seen.append(a))
    shards = [(done, total) for done, total, label in seen if label.endswith(".safetensors")]
    assert shards == sorted(shards)
    assert len({total for _, total in shards}) == 1
    assert shards[-1][0] > 0.95 * shards[-1][1]  # headers are not counted


def test_a_result_that_does_not_read_back_is_not_kept(base: Checkpoint, tmp_path: Path) -> None:
    """Edits that disagree with the config: refused by the reading of what was written."""
    with pytest.raises(CheckpointError, match="number of experts"):
        write_checkpoint(base, {some(base, "router.proj.weight"): Take(0, (0, 1, 2))}, base.config, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from gemcut.checkpoint import open_checkpoint, write_checkpoint
from gemcut.errors import MissingError
from gemcut.types import Mask
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
base = open_checkpoint(Path(sys.argv[1]))
name = next(n for n in base.tensors if n.endswith("experts.down_proj"))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    write_checkpoint(base, {name: Mask(0, (1,))}, base.config, Path(sys.argv[2]), link=False)
except MissingError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("limit", [100, 70_000, 300_000, 345_000])
def test_a_full_disk_leaves_nothing_behind(base: Checkpoint, tmp_path: Path, limit: int) -> None:
    """The kernel refuses to let a file grow past the limit, as a full disk would."""
    before = state(base.path)
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(base.path), str(tmp_path / "out"), str(limit)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 3, run.stderr
    assert "disk is full" in run.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    assert state(base.path) == before


def test_too_small_a_disk_is_refused_before_the_work(base: Checkpoint, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    path = base.path / "huge.bin"
    with open(path, "wb") as f:
        f.truncate(free + (1 << 30))  # sparse: costs nothing here, and would not fit as a copy
    with pytest.raises(MissingError, match="not enough disk space"):
        write_checkpoint(base, {}, base.config, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Peak RSS of a process that cuts a 400 MB tensor stays far below the tensor."""
    make = """
import sys
from pathlib import Path
import synthetic
geometry = synthetic.Geometry(hidden=1024, expert_width=1024, experts=96, dense=64)
synthetic.write(Path(sys.argv[1]) / "base", layers=1, geometry=geometry)
"""
    bench = Path(__file__).parents[2] / "bench"
    subprocess.run(
        [sys.executable, "-c", make, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": str(bench)}
    )
    cut = """
import sys
from pathlib import Path
from gemcut.checkpoint import open_checkpoint, write_checkpoint
from gemcut.types import Take
base = open_checkpoint(Path(sys.argv[1]) / "base")
sites = [s for s in base.sites if s.kind == "experts"]
edits = {c.name: Take(0, tuple(range(0, 96, 2))) for s in sites for c in s.slices}
config = dict(base.config, text_config={**base.text_config, "num_experts": 48})
biggest = max(r.size_bytes for r in base.tensors.values())
write_checkpoint(base, edits, config, Path(sys.argv[1]) / "out")
status = Path("/proc/self/status").read_text()
print(biggest, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""
    run = subprocess.run([sys.executable, "-c", cut, str(tmp_path)], check=True, capture_output=True, text=True)
    biggest, peak = map(int, run.stdout.split())
    assert biggest > 400e6
    assert peak < 256 << 20
