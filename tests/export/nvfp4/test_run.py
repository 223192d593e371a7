"""NVFP4 folders: what they hold, to the byte; refused before the first byte; the same whatever broke off before."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, MissingError, QualityError, UsageError
from gemcut.export.nvfp4.check import verify_nvfp4
from gemcut.export.nvfp4.run import Nvfp4Report, Settings, prepare, write_nvfp4
from gemcut.nvfp4.decode import dequantise
from observed import EVEN, statistics
from tiny import add_vision, make_tiny

GATE, UP = ("model.language_model.layers.1.mlp.gate_proj", "model.language_model.layers.1.mlp.up_proj")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(add_vision(make_tiny(tmp_path_factory.mktemp("tiny") / "moe")))


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint) -> Path:
    tokens = EVEN.copy()
    tokens[3] = 0
    return statistics(tmp_path_factory.mktemp("observed") / "s", moe, tokens)


def export(model: Checkpoint, out: Path, settings: Settings, stats: Path | None = None) -> Nvfp4Report:
    return write_nvfp4(prepare(model, settings, stats), out)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        out |= load_file(path)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def read_back(tensors: dict[str, torch.Tensor], module: str) -> np.ndarray:
    scales = tensors[f"{module}.weight_scale"].view(torch.uint8).numpy()
    return dequantise(
        tensors[f"{module}.weight_packed"].numpy(), scales, float(tensors[f"{module}.weight_global_scale"])
    )


def test_weights_only(moe: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(moe, out, Settings("NVFP4A16", "all"))
    base, found = tensors_in(moe.path), tensors_in(out)
    assert not any("input_global_scale" in name for name in found)
    for e in range(8):
        fused = base["model.language_model.layers.2.experts.gate_up_proj"][e].float().numpy()  # [2I, H]
        prefix = f"model.language_model.layers.2.experts.{e}"
        scales = {float(found[f"{prefix}.{name}.weight_global_scale"]) for name in ("gate_proj", "up_proj")}
        assert len(scales) == 1  # one for both
        assert scales.pop() == pytest.approx(2688 / float(np.abs(fused).max()), rel=1e-6)
        back = np.concatenate([read_back(found, f"{prefix}.{name}") for name in ("gate_proj", "up_proj")])
        assert np.linalg.norm(back - fused) / np.linalg.norm(fused) < 0.09
    layer = "model.language_model.layers.1.self_attn"
    qkv = {float(found[f"{layer}.{name}.weight_global_scale"]) for name in ("q_proj", "k_proj", "v_proj")}
    assert len(qkv) == 1
    left = {name for name in base if name in found}
    assert all(same(base[name], found[name]) for name in left)
    assert {name for name in base if "vision" in name or "norm" in name or "router" in name} <= left
    record = json.loads((out / "nvfp4.json").read_text())
    assert record["parent"] == moe.fingerprint
    assert set(record["modules"]) == {name.removesuffix(".weight_packed") for name in found if "packed" in name}
    assert report.size_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    config, before = json.loads((out / "config.json").read_text()), json.loads((moe.path / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == before
    assert said["config_groups"]["group_0"]["input_activations"] is None
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["default_stage"]["default_modifiers"]["QuantizationModifier"]["ignore"] == said["ignore"]
    sums = (out / "SHA256SUMS").read_text()
    assert all(name in sums for name in ("nvfp4.json", "recipe.yaml", "config.json", "manifest.json"))


def test_weights_and_activations(moe: Checkpoint, stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(moe, out, Settings("NVFP4", "mlp+experts"), stats)
    found = tensors_in(out)
    assert float(found[f"{GATE}.input_global_scale"]) == pytest.approx(2688 / (64 * 4))
    assert torch.equal(found[f"{GATE}.input_global_scale"], found[f"{UP}.input_global_scale"])
    prefix = "model.language_model.layers.0.experts"
    assert float(found[f"{prefix}.1.down_proj.input_global_scale"]) == pytest.approx(2688 / (32 * 4 * 2))
    peers = float(found[f"{prefix}.7.down_proj.input_global_scale"])  # the loudest of those that saw enough
    assert float(found[f"{prefix}.3.down_proj.input_global_scale"]) == peers
    assert len(report.borrowed) == 6 * 3
    assert all(".experts.3." in name for name in report.borrowed)
    record = json.loads((out / "nvfp4.json").read_text())
    assert record["borrowed"] == list(report.borrowed)
    assert record["scales"] == "weighted"
    assert str(tmp_path) not in (out / "nvfp4.json").read_text()
    verify_nvfp4(open_checkpoint(out, any_architecture=True), moe)


def test_the_same_bytes_whatever_the_threads_and_the_shards(moe: Checkpoint, stats: Path, tmp_path: Path) -> None:
    one = open_checkpoint(make_tiny(tmp_path / "one", "dense", shards=1))
    three = open_checkpoint(make_tiny(tmp_path / "three", "dense", shards=5))
    export(one, tmp_path / "a", Settings("NVFP4A16", "all"))
    export(three, tmp_path / "b", Settings("NVFP4A16", "all", threads=3))
    export(moe, tmp_path / "c", Settings("NVFP4"), stats)
    export(moe, tmp_path / "d", Settings("NVFP4", threads=3), stats)
    a, b = tensors_in(tmp_path / "a"), tensors_in(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(same(a[name], b[name]) for name in a)
    assert (tmp_path / "c" / "SHA256SUMS").read_text() == (tmp_path / "d" / "SHA256SUMS").read_text()


def test_each_rule_of_block_scales_reads_back_closer(moe: Checkpoint, tmp_path: Path) -> None:
    errors = [
        export(moe, tmp_path / method, Settings("NVFP4A16", "mlp", scales=method)).relative_error  # type: ignore[arg-type]
        for method in ("minmax", "four_over_six", "sweep")
    ]
    assert errors[2] < 0.95 * errors[1] < 0.95 * 0.95 * errors[0]


def test_fp8_cache(moe: Checkpoint, tmp_path: Path) -> None:
    export(moe, tmp_path / "one", Settings("NVFP4A16", kv="one"))
    export(moe, tmp_path / "bound", Settings("NVFP4A16", kv="bound"))
    base, one, bound = (tensors_in(folder) for folder in (moe.path, tmp_path / "one", tmp_path / "bound"))
    for layer, width in ((0, 16), (5, 32)):  # the full layer has no v_proj, and a cache of values all the same
        path = f"model.language_model.layers.{layer}.self_attn"
        assert one[f"{path}.k_scale"].tolist() == one[f"{path}.v_scale"].tolist() == [1.0]
        largest = math.sqrt(width) * float(base[f"{path}.k_norm.weight"].float().abs().max())
        assert largest <= float(bound[f"{path}.k_scale"]) * 448 <= 1.01 * largest
        assert math.sqrt(width) <= float(bound[f"{path}.v_scale"]) * 448 <= 1.01 * math.sqrt(width)
    said = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert said["kv_cache_scheme"]["num_bits"] == 8
    verify_nvfp4(open_checkpoint(tmp_path / "bound", any_architecture=True), moe)


def test_a_cache_as_it_was_seen(moe: Checkpoint, tmp_path: Path) -> None:
    stats = statistics(tmp_path / "stats", moe, EVEN)
    settings = Settings("NVFP4A16", scales="sweep", kv="calibrated")
    with pytest.raises(UsageError, match="wants statistics"):
        prepare(moe, settings)
    write_nvfp4(prepare(moe, settings, stats), tmp_path / "out")
    out = tensors_in(tmp_path / "out")
    for layer in range(6):
        for name in ("k_scale", "v_scale"):
            scale = float(out[f"model.language_model.layers.{layer}.self_attn.{name}"])
            assert 0.5 + layer / 4 <= scale * 448 <= 1.01 * (0.5 + layer / 4)
    verify_nvfp4(open_checkpoint(tmp_path / "out", any_architecture=True), moe)
    record = json.loads((tmp_path / "out" / "nvfp4.json").read_text())
    assert record["kv"] == "calibrated"
    assert record["statistics"]


@pytest.mark.parametrize("size", [0.0, 1e6])
def test_keys_that_their_norm_does_not_allow(moe: Checkpoint, tmp_path: Path, size: float) -> None:
    stats = statistics(tmp_path / "stats", moe, EVEN)
    path = stats / "layer-002.safetensors"
    with safe_open(path, framework="pt") as f:
        tensors, said = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118 - not a dict
    tensors["cache.k.amax"][:] = size
    save_file(tensors, path, metadata=said)
    with pytest.raises(QualityError, match="layer 2"):
        prepare(moe, Settings("NVFP4A16", scales="sweep", kv="calibrated"), stats)


def test_zero_weights_and_zero_experts(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "zero", "moe", shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{GATE}.weight"].zero_()
    tensors[f"{UP}.weight"].zero_()
    tensors["model.language_model.layers.0.experts.gate_up_proj"][2] = 0
    tensors["model.language_model.layers.3.mlp.down_proj.weight"][:, 16:32] = 0
    save_file(tensors, folder / "model.safetensors")
    model = open_checkpoint(folder)
    export(model, tmp_path / "out", Settings("NVFP4A16"))
    found = tensors_in(tmp_path / "out")
    assert not read_back(found, GATE).any()
    assert not read_back(found, "model.language_model.layers.0.experts.2.up_proj").any()
    assert not read_back(found, "model.language_model.layers.3.mlp.down_proj")[:, 16:32].any()
    verify_nvfp4(open_checkpoint(tmp_path / "out", any_architecture=True), model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, bad: float) -> None:
    folder = make_tiny(tmp_path / "bad", "dense", shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite") as error:
        export(open_checkpoint(folder), tmp_path / "out", Settings("NVFP4A16"))
    assert UP in str(error.value.where)
    assert not list(tmp_path.glob("out*"))


def test_refused_before_anything_is_written(moe: Checkpoint, stats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only statistics"):
        prepare(moe, Settings("NVFP4"))
    with pytest.raises(UsageError, match="only statistics"):
        prepare(moe, Settings("NVFP4A16", scales="weighted"))
    with pytest.raises(MissingError):
        prepare(moe, Settings("NVFP4A16", device="cuda:17"))
    with pytest.raises(QualityError, match="cover too little"):
        prepare(moe, Settings("NVFP4", max_borrowed=0.1), stats)
    other = open_checkpoint(make_tiny(tmp_path / "other", "moe", seed=5))
    with pytest.raises(CheckpointError, match="another checkpoint"):
        prepare(other, Settings("NVFP4"), stats)
    export(moe, tmp_path / "out", Settings("NVFP4A16", "mlp"))
    with pytest.raises(UsageError, match="quantised already"):
        prepare(open_checkpoint(tmp_path / "out"), Settings("NVFP4A16"))
    with pytest.raises(UsageError, match="exists already"):
        export(moe, tmp_path / "out", Settings("NVFP4A16", "mlp"))


KILLED = """
import sys, time
from pathlib import Path
from gemcut.checkpoint import open_checkpoint
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
base = open_checkpoint(Path(sys.argv[1]))
def slow(done, total, label):
    print(done, flush=True)
    time.sleep(0.05)
write_nvfp4(prepare(base, Settings("NVFP4A16", "mlp+experts")), Path(sys.argv[2]), progress=slow)
"""


def test_a_kill_leaves_nothing_that_looks_finished(moe: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(moe.path), str(out)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(20):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(0.01)
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    export(moe, out, Settings("NVFP4A16"))
    assert not (tmp_path / "out.partial").exists()
    export(moe, tmp_path / "again", Settings("NVFP4A16"))
    assert (out / "SHA256SUMS").read_text() == (tmp_path / "again" / "SHA256SUMS").read_text()


@pytest.mark.parametrize(("kind", "dtype"), [("moe-text", "bfloat16"), ("dense", "float32"), ("dense-text", "float16")])
def test_other_names_and_other_floats(tmp_path: Path, kind: str, dtype: str) -> None:
    model = open_checkpoint(make_tiny(tmp_path / "model", kind, dtype=dtype))  # type: ignore[arg-type]
    export(model, tmp_path / "out", Settings("NVFP4A16", "all", kv="one", threads=2))
    found = verify_nvfp4(open_checkpoint(tmp_path / "out", any_architecture=True), model)
    assert 0.07 < found.relative_error < 0.09
