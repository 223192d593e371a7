"""Packed linears seen as the tensors that they came from; what does not fit together is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.nvfp4.plain import divisor, plain_tensors, read_rows
from observed import EVEN, statistics
from tiny import make_tiny

PREFIX = "model.language_model.layers.1."


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("tiny") / "moe", shards=1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("nvfp4")
    stats = statistics(place / "s", moe, EVEN)
    for layout in ("compressed-tensors", "modelopt"):
        write_nvfp4(prepare(moe, Settings("NVFP4", "all", layout=layout, kv="one"), stats), place / layout)  # type: ignore[arg-type]
    return {layout: place / layout for layout in ("compressed-tensors", "modelopt")}


def plain_values(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder, any_architecture=True)
    plain = plain_tensors(checkpoint)
    out = {}
    for name, packed in plain.packed.items():
        rows = [
            read_rows(checkpoint, one, divisor(checkpoint, one.scale, plain.told.layout), 0, one.matrix.rows)
            for one in packed
        ]
        out[name] = np.concatenate(rows).reshape(plain.shapes[name])
    return out


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_shapes_and_values_of_the_base(moe: Checkpoint, folders: dict[str, Path], layout: str) -> None:
    found = open_checkpoint(folders[layout], any_architecture=True)
    plain = plain_tensors(found)
    assert len(plain.cache) == 6
    assert plain.shapes == {name: ref.shape for name, ref in moe.tensors.items()}  # no scale of anything is left
    assert len(plain.packed) == 6 * 9 - 1  # q, k, v, o, gate, up, down, two of experts; the full layer has no v
    base = load_file(moe.path / "model.safetensors")
    for name, values in plain_values(folders[layout]).items():
        want = base[name].float().numpy()
        assert np.linalg.norm(values - want) / np.linalg.norm(want) < 0.11, name


def test_both_layouts_are_the_same_numbers(folders: dict[str, Path]) -> None:
    one, other = (plain_values(folder) for folder in folders.values())
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[PREFIX + name]

    return change


def expert_of(number: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Expert 3 under another number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{PREFIX}experts.3.")]:
            tensors[name.replace("experts.3.", f"experts.{number}.")] = tensors.pop(name)

    return change


def narrower(tensors: dict[str, torch.Tensor]) -> None:
    for end in ("weight_packed", "weight_scale"):
        name = f"{PREFIX}experts.3.down_proj.{end}"
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()


def scales_of_half(tensors: dict[str, torch.Tensor]) -> None:
    name = f"{PREFIX}mlp.up_proj.weight_scale"
    tensors[name] = tensors[name][::2].contiguous()


def stranger(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{PREFIX}mlp.up_proj.")]:
        tensors[name.replace(f"{PREFIX}mlp.up_proj", "model.vision_tower.up_proj")] = tensors[name].clone()


BROKEN = {
    "no scales": (without("mlp.up_proj.weight_scale"), "a tensor is missing"),
    "no scale of inputs": (without("mlp.up_proj.input_global_scale"), "a tensor is missing"),
    "scales of half": (scales_of_half, "another form"),
    "an expert in part": (without("experts.2.up_proj.weight_packed"), "an expert is missing"),
    "a gap": (expert_of("9"), "an expert is missing"),
    "a huge number": (expert_of("99999999999"), "strange name"),
    "no number": (expert_of("x"), "strange name"),
    "a narrow expert": (narrower, "different shapes"),
    "keys without values": (without("self_attn.v_scale"), "scale of a layer's values is missing"),
    "a stranger": (stranger, "no matrix of the decoder"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path, what: str) -> None:
    change, message = BROKEN[what]
    tensors = load_file(folders["compressed-tensors"] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["compressed-tensors"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        plain_tensors(open_checkpoint(tmp_path, any_architecture=True))


def test_plain_checkpoints_are_no_nvfp4(moe: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="does not speak of NVFP4"):
        plain_tensors(moe)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_positive_numbers(folders: dict[str, Path], tmp_path: Path, value: float) -> None:
    tensors = load_file(folders["compressed-tensors"] / "model.safetensors")
    name = f"{PREFIX}mlp.up_proj.weight_global_scale"
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["compressed-tensors"] / "config.json").read_bytes())
    found = open_checkpoint(tmp_path, any_architecture=True)
    with pytest.raises(CheckpointError, match="not a positive number"):
        divisor(found, found.ref(name), "compressed-tensors")
