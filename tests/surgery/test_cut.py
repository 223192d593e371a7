"""From plan to bytes: what a plan may say, the golden bytes of one cut, and kills at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import synthetic
from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.surgery import cut, edits_for, verify_cut
from gemcut.types import LayerPlan, Plan

SMALL = synthetic.Geometry(
    hidden=32, experts=8, expert_width=8, top_k=2, dense=16, heads=4, kv_heads=2, global_kv_heads=1, head_dim=8,
    global_head_dim=16, vocabulary=64,
)  # fmt: skip
KEEP = {
    0: (0, 1, 2, 3, 4),
    1: (3, 4, 5, 6, 7),
    2: (0, 2, 4, 6, 7),
    3: (1, 3, 5, 6, 7),
    4: (0, 1, 4, 5, 6),
    5: (0, 2, 3, 5, 7),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("cut") / "base"
    synthetic.write(folder, layers=6, geometry=SMALL, shard_bytes=40_000)
    return open_checkpoint(folder)


def layer_plan(keep: tuple[int, ...], units: int = 8) -> LayerPlan:
    return LayerPlan(keep, {u: f"rank {u}" for u in range(units) if u not in keep})


def expert_plan(base: Checkpoint, keep: dict[int, tuple[int, ...]] | None = None, units: int = 8) -> Plan:
    layers = {layer: layer_plan(kept, units) for layer, kept in (keep or KEEP).items()}
    return Plan("experts", base.fingerprint, units, layers)


def state(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_cuts_five_things_and_leaves_the_rest_alone(base: Checkpoint, tmp_path: Path) -> None:
    plan = expert_plan(base)
    manifest = cut(base, plan, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    for name, ref in base.tensors.items():
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
        whole = base.read(name).view("<u2").reshape(ref.shape)
        new = out.read(name).view("<u2").reshape(out.ref(name).shape)
        sliced = name.endswith(("gate_up_proj", "experts.down_proj", "router.proj.weight", "per_expert_scale"))
        assert np.array_equal(new, whole[list(KEEP[layer])] if sliced else whole), name
    assert manifest.config_changes == {"text_config.num_experts": (8, 5)}
    facts = [fact for fact in manifest.tensors if fact.found != "same"]
    assert len(facts) == 24
    assert all(fact.index == KEEP[int(fact.name.split(".")[3])] and fact.axis == 0 for fact in facts)
    report = verify_cut(out, base, plan)
    assert report.layers_changed == (0, 1, 2, 3, 4, 5)


def test_identity_plan_gives_the_same_bytes(base: Checkpoint, tmp_path: Path) -> None:
    before = state(base.path)
    manifest = cut(base, expert_plan(base, dict.fromkeys(range(6), tuple(range(8)))), tmp_path / "out")
    after = state(tmp_path / "out")
    assert {k: v for k, v in after.items() if k not in ("manifest.json", "SHA256SUMS")} == before
    assert all((base.path / s).samefile(tmp_path / "out" / s) for s in base.shards)
    assert {fact.found for fact in manifest.tensors} == {"same"}
    assert manifest.config_changes == {}


# ---------------------------------------------------------------- plans that do not fit


def test_a_plan_for_another_checkpoint(base: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="another checkpoint") as caught:
        edits_for(dataclasses.replace(expert_plan(base), model_fingerprint="0" * 64), base)
    assert base.fingerprint[:12] in str(caught.value)


@pytest.mark.parametrize(
    ("keep", "match"),
    [({k: v for k, v in KEEP.items() if k != 3}, "disagree about the layers"), ({**KEEP, 6: KEEP[0]}, "disagree about"),
     ({}, "disagree about")],
)  # fmt: skip
def test_a_plan_for_other_layers(base: Checkpoint, keep: dict[int, tuple[int, ...]], match: str) -> None:
    plan = dataclasses.replace(expert_plan(base), layers={k: layer_plan(v) for k, v in keep.items()})
    with pytest.raises(CheckpointError, match=match):
        edits_for(plan, base)


def test_a_plan_for_another_number_of_experts(base: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="another number of experts"):
        edits_for(expert_plan(base, units=9), base)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (LayerPlan((0, 1, 2, 3, 8), {}), "does not exist"),
        (LayerPlan((-1, 1, 2, 3, 4), {}), "does not exist"),
        (LayerPlan((0, 1, 2, 3, 4), {5: "x", 6: "x", 7: "x", 99: "x"}), "does not exist"),
        (LayerPlan((0, 1, 1, 3, 4), {2: "x", 5: "x", 6: "x", 7: "x"}), "ascending order"),
        (LayerPlan((1, 0, 2, 3, 4), {5: "x", 6: "x", 7: "x"}), "ascending order"),
        (LayerPlan((0, 1, 2, 3, 4), {5: "x", 6: "x"}), "unit 7 is neither"),
        (LayerPlan((0, 1, 2, 3, 4), {4: "x", 5: "x", 6: "x", 7: "x"}), "unit 4 is both"),
        (LayerPlan((0, 1, 2, 3, 4), {5: "x", 6: " ", 7: "x"}), "without a reason"),
        (LayerPlan((), dict.fromkeys(range(8), "x")), "keeps nothing"),
        (layer_plan((0, 1, 2)), "different numbers"),
        (layer_plan((0,)), "at least 2"),
    ],
)
def test_plans_that_say_nonsense(base: Checkpoint, layer: LayerPlan, match: str) -> None:
    plan = expert_plan(base)
    with pytest.raises(UsageError, match=match):
        edits_for(dataclasses.replace(plan, layers={**plan.layers, 4: layer}), base)


def test_nothing_is_written_for_a_bad_plan(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        cut(base, expert_plan(base, dict.fromkeys(range(6), (3,))), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_dense_checkpoint_has_no_experts(base: Checkpoint, tmp_path: Path) -> None:
    config = json.loads((base.path / "config.json").read_text())
    config["text_config"].update(enable_moe_block=False, num_experts=None)
    folder = tmp_path / "dense"
    folder.mkdir()
    for path in base.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    dense = open_checkpoint(folder)
    with pytest.raises(UsageError, match="no experts to cut"):
        edits_for(dataclasses.replace(expert_plan(base), model_fingerprint=dense.fingerprint), dense)


# ---------------------------------------------------------------- golden


def golden_base(folder: Path) -> Checkpoint:
    """A checkpoint whose bytes are arithmetic: the same on every machine and with every numpy."""
    g = dataclasses.replace(SMALL, experts=4)
    tensors = {}
    for k, (name, shape) in enumerate(synthetic.shapes(g, 1)):
        n = int(np.prod(shape))
        tensors[name] = ((np.arange(n, dtype=np.uint64) * 2654435761 + k * 40503) % 65521).astype("<u2").reshape(shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = synthetic.config(g, 1)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return open_checkpoint(folder)


def test_golden(tmp_path: Path) -> None:
    """The bytes of one small cut, fixed. A change here is a change of what users get."""
    base = golden_base(tmp_path / "base")
    cut(base, expert_plan(base, {0: (0, 2, 3)}, units=4), tmp_path / "out")
    assert {name: digest[:16] for name, digest in state(tmp_path / "out").items()} == GOLDEN
    # and independently: the reference writer, given the taken arrays, writes the same file
    tensors = load_file(base.path / "model.safetensors")
    sliced = ("gate_up_proj", "experts.down_proj", "router.proj.weight", "per_expert_scale")
    taken = {name: t.take([0, 2, 3], 0) if name.endswith(sliced) else t for name, t in tensors.items()}
    save_file(taken, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "reference.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


GOLDEN = {
    "SHA256SUMS": "55a65b09fd61307d",
    "config.json": "c2f013fe0d453b3c",
    "manifest.json": "c88264ae87b901a9",
    "model.safetensors": "f1cf5481eacbf879",
}


# ---------------------------------------------------------------- kills

MEDIUM = synthetic.Geometry(
    hidden=512, experts=64, expert_width=256, top_k=4, dense=512, heads=4, kv_heads=2, global_kv_heads=1, head_dim=64,
    global_head_dim=128, vocabulary=512,
)  # fmt: skip
CUT = """
import sys
from pathlib import Path
from gemcut.checkpoint import open_checkpoint
from gemcut.records import load_plan
from gemcut.surgery import cut
print("go", flush=True)
cut(open_checkpoint(Path(sys.argv[1])), load_plan(Path(sys.argv[2])), Path(sys.argv[3]), force=sys.argv[4] == "force")
print("done", flush=True)
"""


def start(*args: object) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", CUT, *map(str, args)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    return process


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    """50 kill -9 at random moments of a cut of 160 MB, half of them over an existing output."""
    from gemcut.records import save_plan

    synthetic.write(tmp_path / "base", layers=3, geometry=MEDIUM, shard_bytes=60 << 20)
    base = open_checkpoint(tmp_path / "base")
    assert base.size_bytes > 150e6
    before = state(base.path)
    keep = tuple(sorted(random.Random(0).sample(range(64), 48)))
    save_plan(expert_plan(base, dict.fromkeys(range(3), keep), units=64), tmp_path / "plan.json")
    begin = time.perf_counter()
    assert start(base.path, tmp_path / "plan.json", tmp_path / "whole", "new").wait() == 0
    seconds = time.perf_counter() - begin
    wanted = state(tmp_path / "whole")
    out = tmp_path / "out"
    rng = random.Random(1)
    landed = attempt = 0
    while landed < 50:
        attempt += 1
        assert attempt < 250, "the kills come too late"
        force = attempt % 2 == 1
        if force:  # an older output of the user's that must survive whole
            out.mkdir(exist_ok=True)
            for path in out.iterdir():
                path.unlink()
            (out / "old").write_text("old")
        elif out.exists():
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        process = start(base.path, tmp_path / "plan.json", out, "force" if force else "new")
        time.sleep(rng.uniform(0, seconds * 1.1))
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            landed += 1
        else:
            seconds *= 0.8  # it was through before: the machine has become faster than when it was timed
        assert process.stdout is not None
        process.stdout.close()
        if out.exists():
            found = state(out)
            assert found == wanted or (force and set(found) == {"old"}), f"attempt {attempt}: half a folder"
        else:
            assert not force, f"attempt {attempt}: neither the old folder nor the new one"
        assert state(base.path) == before
    assert start(base.path, tmp_path / "plan.json", out, "force").wait() == 0
    assert state(out) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "plan.json", "whole"]
