"""Damage that loads without a word: every kind is found, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError
from gemcut.export.nvfp4.check import verify_nvfp4
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from observed import EVEN, statistics
from tiny import add_vision, make_tiny

LAYER = "model.language_model.layers.1"
DOWN = f"{LAYER}.mlp.down_proj"
GATE = f"{LAYER}.mlp.gate_proj"
EXPERT = f"{LAYER}.experts.4"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = add_vision(make_tiny(tmp_path_factory.mktemp("tiny") / "moe", shards=1))
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint) -> Path:
    made = tmp_path_factory.mktemp("good")
    folder = statistics(made / "s", moe, EVEN)
    write_nvfp4(prepare(moe, Settings("NVFP4", kv="one", scales="sweep"), folder), made / "out")
    return made / "out"


def damaged(good: Path, out: Path, change: Callable[[Tensors], object]) -> Checkpoint:
    """The folder with other tensors and without its record, as another tool could have written it."""
    shutil.copytree(good, out)
    for name in ("manifest.json", "SHA256SUMS"):
        (out / name).unlink()
    path = out / "model-00001-of-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    where = {name: file for name, file in index["weight_map"].items() if file != path.name}
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**where, **dict.fromkeys(tensors, path.name)}})
    )
    return open_checkpoint(out, any_architecture=True)


def test_a_good_folder(moe: Checkpoint, good: Path, tmp_path: Path) -> None:
    found = verify_nvfp4(open_checkpoint(good, any_architecture=True), moe)
    assert (found.scheme, found.layout, found.cache) == ("NVFP4", "compressed-tensors", True)
    assert found.modules == 18 + 6 * 8 * 3
    assert found.verified.record_checked
    assert 0.07 < found.relative_error < 0.09
    assert 4.5 < found.bits_per_weight < 4.6
    assert not verify_nvfp4(damaged(good, tmp_path / "out", lambda _: None), moe).verified.record_checked


def swap_nibbles(tensors: Tensors) -> None:
    packed = tensors[f"{DOWN}.weight_packed"]
    tensors[f"{DOWN}.weight_packed"] = (packed >> 4) | (packed << 4)


def other_axis(tensors: Tensors) -> None:
    scales = tensors[f"{DOWN}.weight_scale"].view(torch.uint8)
    tensors[f"{DOWN}.weight_scale"] = scales.flip(0).contiguous().view(torch.float8_e4m3fn)


def scaled(name: str, factor: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name] * factor})


def block_scale(value: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[3].fill_(value)


def gone(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        (swap_nibbles, "reads back unlike", DOWN),
        (other_axis, "reads back unlike", DOWN),
        (scaled(f"{DOWN}.weight_global_scale", 1.2), "reads back unlike", DOWN),
        (scaled(f"{GATE}.weight_global_scale", 1.01), "different global scales", GATE),
        (scaled(f"{DOWN}.weight_global_scale", float("nan")), "not a positive number", DOWN),
        (scaled(f"{DOWN}.weight_global_scale", -1.0), "not a positive number", DOWN),
        (block_scale(0x7F), "NaN or negative", DOWN),
        (block_scale(0xB0), "NaN or negative", DOWN),
        (scaled(f"{EXPERT}.down_proj.input_global_scale", 1e-37), "not plausible", EXPERT),
        (scaled(f"{EXPERT}.down_proj.input_global_scale", 1000.0), "far from its layer's", EXPERT),
        (scaled(f"{GATE}.input_global_scale", 2.0), "different scales of its inputs", GATE),
        (scaled(f"{LAYER}.self_attn.k_scale", 8e30), "scale of the cache", f"{LAYER}.self_attn.k_scale"),
        (gone(f"{DOWN}.weight_scale"), "missing", DOWN),
        (gone(f"{LAYER}.self_attn.v_scale"), "missing", f"{LAYER}.self_attn.v_scale"),
        (gone(*(f"{EXPERT}.up_proj.{part}" for part in PARTS)), "in part", f"{EXPERT}.up_proj"),
        (gone(*(f"{EXPERT}.down_proj.{part}" for part in PARTS)), "some experts", f"layer 1, {EXPERT}.down_proj"),
        (lambda t: t.update({"stray": torch.zeros(4)}), "belongs to nothing", "stray"),
        (lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].float()}), "another form", DOWN),
        (scaled(f"{LAYER}.router.proj.weight", 2.0), "not the base's", f"{LAYER}.router.proj.weight"),
    ],
)
def test_damage_is_named(
    moe: Checkpoint, good: Path, tmp_path: Path, change: Callable[[Tensors], object], what: str, where: str
) -> None:
    with pytest.raises(CheckpointError, match=what) as error:
        verify_nvfp4(damaged(good, tmp_path / "out", change), moe)
    assert str(error.value.where).startswith(where)


def configured(good: Path, out: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> Checkpoint:
    shutil.copytree(good, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return open_checkpoint(out, any_architecture=True)


def ignoring(*entries: str) -> Callable[[dict[str, dict[str, object]]], object]:
    return lambda config: config["quantization_config"].update(ignore=list(entries))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (ignoring("lm_head"), "nothing says so"),
        (ignoring("re:.*"), "quantised module is ignored"),
        (lambda c: c["text_config"].pop("global_head_dim"), "config.json is not the base's"),
        (lambda c: c["text_config"].update(num_experts=4), "config.json is not the base's"),
        (lambda c: c["quantization_config"].update(kv_cache_scheme=None), "belongs to nothing"),
        (lambda c: c["quantization_config"].pop("ignore"), "does not say what is quantised"),
        (lambda c: c["quantization_config"].update(format="int4"), "does not speak of NVFP4"),
    ],
)
def test_configs_that_say_something_else(
    moe: Checkpoint, good: Path, tmp_path: Path, change: Callable[[dict[str, dict[str, object]]], object], what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        verify_nvfp4(configured(good, tmp_path / "out", change), moe)


def test_a_tokenizer_that_was_left_behind(moe: Checkpoint, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="a file of the base is missing"):
        verify_nvfp4(open_checkpoint(tmp_path / "out", any_architecture=True), moe)
