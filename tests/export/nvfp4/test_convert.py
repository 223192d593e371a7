"""Both layouts say the same: there and back without a changed bit, and each passes the same checks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.nvfp4.check import verify_nvfp4
from gemcut.export.nvfp4.convert import convert, plan_conversion
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from observed import EVEN, statistics
from tiny import add_vision, make_tiny


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(add_vision(make_tiny(tmp_path_factory.mktemp("tiny") / "moe")))


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint) -> Path:
    return statistics(tmp_path_factory.mktemp("observed") / "s", moe, EVEN)


def tensors_in(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    out = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            out[name] = (tensor.dtype, tuple(tensor.shape), raw)
    return out


def turned(folder: Path, layout: str, out: Path) -> Path:
    meant = plan_conversion(open_checkpoint(folder, any_architecture=True), layout)  # type: ignore[arg-type]
    assert meant.inexact == 0
    convert(meant, out)
    return out


@pytest.mark.parametrize(
    ("scheme", "targets", "kv", "ignore"),
    [
        ("NVFP4A16", "all", "bound", ()),
        ("NVFP4", "mlp+experts", "one", (r"layers\.2\.experts", r"layers\.[13]\.mlp\.down")),
        ("NVFP4", "mlp", "none", ()),
    ],
)
def test_there_and_back(
    moe: Checkpoint, stats: Path, tmp_path: Path, scheme: str, targets: str, kv: str, ignore: tuple[str, ...]
) -> None:
    folders = {}
    for layout in ("compressed-tensors", "modelopt"):
        words = Settings(scheme, targets, layout=layout, kv=kv, ignore=ignore)  # type: ignore[arg-type]
        folders[layout] = tmp_path / layout
        write_nvfp4(prepare(moe, words, stats), folders[layout])
    for one, other in (("compressed-tensors", "modelopt"), ("modelopt", "compressed-tensors")):
        made = turned(folders[one], other, tmp_path / f"to-{other}")
        assert tensors_in(made) == tensors_in(folders[other])  # as if it had been written so at once
        for file in ("config.json", "recipe.yaml"):
            assert (made / file).read_text() == (folders[other] / file).read_text()
        assert (made / "hf_quant_config.json").exists() == (other == "modelopt")
        found = verify_nvfp4(open_checkpoint(made, any_architecture=True), moe)
        assert (found.layout, found.scheme, found.cache) == (other, scheme, kv != "none")
        assert json.loads((made / "nvfp4.json").read_text())["converted_from"] == one
        back = turned(made, one, tmp_path / f"back-to-{one}")
        assert tensors_in(back) == tensors_in(folders[one])


def test_what_modelopts_readers_look_for(moe: Checkpoint, stats: Path, tmp_path: Path) -> None:
    write_nvfp4(prepare(moe, Settings("NVFP4", layout="modelopt", kv="one"), stats), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "NVFP4"
    assert said["kv_cache_quant_algo"] == "FP8"
    assert said["group_size"] == 16
    assert "*.self_attn.qkv_proj" in said["exclude_modules"]
    found = tensors_in(tmp_path / "out")
    module = "model.language_model.layers.0.mlp.down_proj"
    assert found[f"{module}.weight"][0] == torch.uint8
    plain = np.abs(load_file(moe.path / moe.ref(f"{module}.weight").shard)[f"{module}.weight"].float().numpy())
    scale = np.frombuffer(found[f"{module}.weight_scale_2"][2], "<f4")[0]
    assert scale == pytest.approx(plain.max() / 2688, rel=1e-6)
    assert found[f"{module}.weight_scale_2"][1] == ()
    assert np.frombuffer(found[f"{module}.input_scale"][2], "<f4")[0] == pytest.approx(4 * 96 / 2688)
    assert found["model.language_model.layers.5.self_attn.v_proj.v_scale"][:2] == (torch.float32, ())


def test_folders_that_cannot_be_converted(moe: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not speak of NVFP4"):
        plan_conversion(moe, "modelopt")
    write_nvfp4(prepare(moe, Settings("NVFP4A16", "mlp")), tmp_path / "out")
    with pytest.raises(UsageError, match="has this layout already"):
        plan_conversion(open_checkpoint(tmp_path / "out"), "compressed-tensors")


def test_scales_that_do_not_turn_back_are_counted(moe: Checkpoint, tmp_path: Path) -> None:
    write_nvfp4(prepare(moe, Settings("NVFP4A16", "mlp")), tmp_path / "out")
    values = np.arange(1000, 3000, dtype=np.float32) + np.float32(0.1)
    odd = float(values[(np.float32(1) / (np.float32(1) / values)) != values][0])
    path = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_global_scale"))
    tensors[name] = torch.tensor([odd])
    save_file(tensors, path)
    assert plan_conversion(open_checkpoint(tmp_path / "out"), "modelopt").inexact == 1
    tensors[name] = torch.tensor([0.0])
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="no positive number"):
        plan_conversion(open_checkpoint(tmp_path / "out"), "modelopt")
