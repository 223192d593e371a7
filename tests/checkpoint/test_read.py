"""Opening a folder: what is believed, what is refused, and that no tensor byte is read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import synthetic
from gemcut.checkpoint.read import INDEX, SINGLE, open_checkpoint
from gemcut.errors import CheckpointError, GemcutError, UsageError
from gemcut.inspection import inspect
from tiny import make_tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "moe", "moe")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "moe"))


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def refused(folder: Path, match: str, kind: type[GemcutError] = CheckpointError) -> None:
    with pytest.raises(kind, match=match):
        open_checkpoint(folder)


def test_opens(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.name == "moe"
    assert len(checkpoint.tensors) == 133
    assert checkpoint.tied
    assert checkpoint.text_config["num_experts"] == 8
    assert [site.kind for site in checkpoint.sites].count("experts") == 6
    assert checkpoint.size_bytes == checkpoint.index["metadata"]["total_size"]  # type: ignore[index,call-overload]
    order = [(ref.shard, ref.start) for ref in checkpoint.tensors.values()]
    assert order == sorted(order)


def test_bytes_are_the_reference_readers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    import torch
    from safetensors.torch import load_file as load_torch

    for number in (1, 2, 3):
        for name, tensor in load_torch(shard(folder, number)).items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
            assert checkpoint.read(name).tobytes() == raw
            assert checkpoint.content_hash(name) == hashlib.sha256(raw).hexdigest()
    name = next(n for n in checkpoint.tensors if n.endswith("experts.down_proj"))
    whole = checkpoint.read(name)
    assert np.array_equal(checkpoint.read_range(name, 30, 50), whole[30:50])
    with pytest.raises(CheckpointError, match="outside the tensor"):
        checkpoint.read_range(name, 7, len(whole) + 1)
    with pytest.raises(CheckpointError, match="no such tensor"):
        checkpoint.read("nope")


def test_opening_reads_no_tensor_bytes(folder: Path) -> None:
    """The weights may be holes of a sparse file: their size is enough."""
    for path in folder.glob("model-*.safetensors"):
        size = path.stat().st_size
        length = struct.unpack("<Q", path.read_bytes()[:8])[0]
        os.truncate(path, 8 + length)
        os.truncate(path, size)
    assert len(open_checkpoint(folder).tensors) == 133


def test_links_into_a_cache_work(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert len(open_checkpoint(folder).tensors) == 133


def test_one_file_without_index(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m", "dense-text", shards=1)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.index is None
    assert list(checkpoint.shards) == [SINGLE]


# ---------------------------------------------------------------- folders


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nope", "no such checkpoint folder", UsageError)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    refused(shard(folder), "is a folder, not a file", UsageError)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{}", b'{"a": 1, "a": 2}', b'{"a": NaN}'])
def test_config_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json is not")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles_are_refused(folder: Path, suffix: str) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / f"pytorch_model{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickles") as caught:
        open_checkpoint(folder)
    assert "safetensors" in str(caught.value)


def test_no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    refused(folder, "no weights")


def test_unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"])
    refused(folder, "no family", UsageError)
    assert open_checkpoint(folder, any_architecture=True).tensors


# ---------------------------------------------------------------- index


def test_missing_shard(folder: Path) -> None:
    shard(folder, 2).unlink()
    refused(folder, "shard is missing")


def test_empty_shard(folder: Path) -> None:
    shard(folder, 2).write_bytes(b"")
    refused(folder, "too short")


def test_cut_off_shard(folder: Path) -> None:
    os.truncate(shard(folder, 2), shard(folder, 2).stat().st_size - 1)
    refused(folder, "outside the file")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", ".hidden.safetensors",
     "a\\b.safetensors", "pytorch_model.bin", "a\0.safetensors", 7, None, ["model.safetensors"],
     "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_hostile_shard_names(folder: Path, name: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "not a plain .safetensors file name")


@pytest.mark.parametrize("value", [{}, [], None, "x"])
def test_index_without_map(folder: Path, value: object) -> None:
    edit_json(folder / INDEX, weight_map=value)
    refused(folder, "no weight_map")


def test_index_names_an_absent_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "no shard holds")


def test_index_places_a_tensor_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name, where = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = next(s for s in index["weight_map"].values() if s != where)
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "in another shard")


def test_index_leaves_a_tensor_out(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][next(iter(index["weight_map"]))]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "does not name")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shutil.copy(shard(folder, 1), shard(folder, 2))
    refused(folder, "in two shards")


def test_two_sets_of_weights(folder: Path) -> None:
    shutil.copy(shard(folder, 1), folder / SINGLE)
    refused(folder, "two sets of weights")


# ---------------------------------------------------------------- config against shapes


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [("num_experts", 7, "number of experts"), ("num_attention_heads", 5, "number of heads"),
     ("head_dim", 8, "number of heads"), ("num_hidden_layers", 7, "layer"), ("num_experts", "8", "num_experts"),
     ("num_experts", -8, "num_experts"), ("layer_types", None, "layer_types"), ("num_attention_heads", None, "heads")],
)  # fmt: skip
def test_config_and_weights_disagree(folder: Path, key: str, value: object, match: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, match)


def test_per_expert_scale_of_another_length_is_caught(folder: Path) -> None:
    """A known bug of another pruner: everything sliced but this one tensor."""
    path = shard(folder, 1)
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(path)
    name = next(n for n in tensors if n.endswith("per_expert_scale"))
    tensors[name] = torch.ones(9, dtype=torch.bfloat16)
    save_torch(tensors, path)
    refused(folder, "number of experts")


# ---------------------------------------------------------------- fingerprint


def small(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    folder.mkdir()
    save_file(tensors, folder / SINGLE)
    (folder / "config.json").write_text('{"architectures": ["x"]}')
    return open_checkpoint(folder, any_architecture=True).fingerprint


def test_fingerprint_knows_the_content_and_not_the_place(tmp_path: Path) -> None:
    big = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    first = small(tmp_path / "a", {"w": big, "n": np.ones(8, np.float32)})
    assert small(tmp_path / "b", {"w": big, "n": np.ones(8, np.float32)}) == first
    norm = np.ones(8, np.float32)
    norm[5] += 1e-6
    assert small(tmp_path / "c", {"w": big, "n": norm}) != first
    tuned = big + np.float32(1e-6)
    assert small(tmp_path / "d", {"w": tuned, "n": np.ones(8, np.float32)}) != first
    masked = big.copy()
    masked[:, 64:128] = 0  # one head's columns
    assert small(tmp_path / "e", {"w": masked, "n": np.ones(8, np.float32)}) != first
    assert small(tmp_path / "f", {"w": big.reshape(1024, 512), "n": np.ones(8, np.float32)}) != first


def test_fingerprint_knows_the_config(folder: Path) -> None:
    before = open_checkpoint(folder).fingerprint
    edit_json(folder / "config.json", eos_token_id=[1, 7])
    assert open_checkpoint(folder).fingerprint != before


def test_fp8_and_bool_pass_through(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "BOOL", "shape": [1], "data_offsets": [3, 4]},
    }
    raw = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\x01\x02\x03\x01")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, any_architecture=True)
    assert checkpoint.read("a").tobytes() == b"\x01\x02\x03"


def test_shrinking_while_open_is_an_error(tmp_path: Path) -> None:
    save_file({"a": np.arange(100, dtype=np.float32)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, any_architecture=True)
    os.truncate(tmp_path / SINGLE, 200)
    with pytest.raises(CheckpointError, match="ended before"):
        checkpoint.read("a")


# ---------------------------------------------------------------- mutations

VALUES: list[Any] = [
    None, 0, -1, 1, 7, 10**6, 10**18, 2**70, 1.5, "", "x", "8", [], {}, [1], {"a": 1}, True, [None] * 6,
    ["full_attention"] * 6, {"0": {"head_dim": -3}},
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """The same JSON with one place changed, removed or added."""
    if not isinstance(value, dict) or not value or rng.random() < 0.2:
        return rng.choice(VALUES)
    key = rng.choice(list(value))
    if rng.random() < 0.15:
        return {k: v for k, v in value.items() if k != key}
    if rng.random() < 0.15:
        return {**value, rng.choice(["per_layer_config", "num_experts", "architectures"]): rng.choice(VALUES)}
    return {**value, key: mutated(value[key], rng)}


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_any_mutation_of_config_or_index_is_opened_or_refused(tmp_path: Path, file: str) -> None:
    """Never a traceback, whatever the file says."""
    geometry = synthetic.Geometry(
        hidden=32, experts=8, expert_width=8, top_k=2, dense=16, heads=4, kv_heads=2, global_kv_heads=1, head_dim=8,
        global_head_dim=16, vocabulary=64,
    )  # fmt: skip
    folder = synthetic.write(tmp_path / "m", layers=6, geometry=geometry, shard_bytes=40_000)
    clean = (folder / file).read_bytes()
    rng = random.Random(0)
    refusals = 0
    for _ in range(200):
        raw = bytearray(clean)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (folder / file).write_bytes(raw if rng.random() < 0.4 else json.dumps(mutated(json.loads(clean), rng)).encode())
        try:
            inspect(open_checkpoint(folder))
        except GemcutError as error:
            str(error).encode()
            refusals += 1
    assert refusals > 80
