"""Layer by layer equals all at once: the logits of a streamed checkpoint are those of the stock model, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.tiny import Kind, make_tiny
from transformers import AutoModelForCausalLM

from gemcut.checkpoint.read import open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.stream.model import StreamedModel
from gemcut.stream.weights import WeightReader

KINDS = get_args(Kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: make_tiny(root / kind, kind) for kind in KINDS}


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(10, 300, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    return ids


def stock_logits(folder: Path, ids: torch.Tensor, dtype: str, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def streamed_logits(folder: Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with StreamedModel.open(open_checkpoint(folder), **options) as model:
        hidden = model.embed(ids)
        for i in range(model.n_layers):
            with model.layer(i) as layer:
                model.prefetch(i + 1)
                hidden = model.run_layer(layer, hidden)
        return model.head(hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_are_the_stock_logits(folders: dict[str, Path], kind: str, dtype: str) -> None:
    ids = token_ids(3, 37)  # longer than the sliding window of 8: both masks are at work
    assert torch.equal(streamed_logits(folders[kind], ids, dtype=dtype), stock_logits(folders[kind], ids, dtype))


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_lengths_around_the_sliding_window(folders: dict[str, Path], length: int) -> None:
    ids = token_ids(1, length)
    assert torch.equal(streamed_logits(folders["moe"], ids), stock_logits(folders["moe"], ids, "bfloat16"))


@pytest.mark.parametrize("kind", ["moe", "moe-text"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_recording_experts_have_the_bits_of_eager(folders: dict[str, Path], kind: str, dtype: str) -> None:
    ids = token_ids(2, 29)
    streamed = streamed_logits(folders[kind], ids, dtype=dtype, experts="recording")
    assert torch.equal(streamed, stock_logits(folders[kind], ids, dtype, experts_implementation="eager"))


def test_a_vision_tower_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """The real wrappers have one; its weights are never read, and text comes out as from the stock model."""
    from safetensors.torch import load_file, save_file
    from transformers import Gemma4VisionConfig, Gemma4VisionModel

    vision = {
        "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
        "position_embedding_size": 64, "standardize": True,
    }  # fmt: skip
    folder = make_tiny(tmp_path / "seeing", "moe", shards=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": vision}))
    state = load_file(folder / "model.safetensors")
    for name, value in Gemma4VisionModel(Gemma4VisionConfig(**vision)).state_dict().items():
        state[f"model.vision_tower.{name}"] = value.bfloat16().contiguous()
    state["model.embed_vision.embedding_projection.weight"] = torch.zeros(64, 32, dtype=torch.bfloat16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids = token_ids(2, 21)
    assert torch.equal(streamed_logits(folder, ids), stock_logits(folder, ids, "bfloat16"))


def test_padding_on_the_right_changes_no_real_token(folders: dict[str, Path]) -> None:
    long, short = token_ids(1, 30, seed=1), token_ids(1, 19, seed=2)
    both = torch.zeros(2, 30, dtype=torch.int64)
    both[0], both[1, :19] = long[0], short[0]
    logits = streamed_logits(folders["moe"], both, dtype="float32")
    alone = streamed_logits(folders["moe"], short, dtype="float32")
    assert torch.allclose(logits[1, :19], alone[0], atol=2e-5)


def test_one_layer_is_in_memory(folders: dict[str, Path]) -> None:
    with StreamedModel.open(open_checkpoint(folders["moe"])) as model:
        whole = [p for p in model._model.parameters() if not p.is_meta]
        assert sum(p.numel() for p in whole) == model.hidden_size  # the final norm
        hidden = model.embed(token_ids(1, 5))
        with model.layer(2) as layer:
            assert not any(p.is_meta for p in layer.parameters())
            assert model._embedding.weight.is_meta
            model.run_layer(layer, hidden)
        assert all(p.is_meta for p in layer.parameters())
        assert layer.layer_scalar.is_meta


def test_a_tied_head_is_not_loaded_twice(folders: dict[str, Path]) -> None:
    with StreamedModel.open(open_checkpoint(folders["moe"])) as model:
        hidden = model.embed(token_ids(1, 5))
        model.head(hidden)
        assert model._model.lm_head.weight.data_ptr() == model._embedding.weight.data_ptr()


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny(tmp_path / "untied", "moe-text", shards=1, tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = torch.randn(320, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids = token_ids(1, 9)
    assert torch.equal(streamed_logits(folder, ids), stock_logits(folder, ids, "bfloat16"))


@pytest.mark.parametrize("experts", ["eager", "recording"])
def test_gradients_are_those_of_the_stock_model(tmp_path: Path, experts: str) -> None:
    """∂ loss / ∂ embedding, from the top down, one layer in memory; nothing of a graph is kept for later calls."""
    folder, ids = make_tiny(tmp_path / "tiny", "moe", dtype="float32", initializer_range=0.2), token_ids(2, 19)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    entering = stock.get_input_embeddings()(ids).detach().requires_grad_()
    wanted = torch.autograd.grad(stock(inputs_embeds=entering, use_cache=False).logits.logsumexp(-1).sum(), entering)[0]
    with StreamedModel.open(open_checkpoint(folder), experts=experts) as model:
        states = [model.embed(ids)]
        for i in range(model.n_layers):
            with model.layer(i) as layer:
                states.append(model.run_layer(layer, states[-1]))
        top = states.pop().requires_grad_()
        gradient = torch.autograd.grad(model.head_with_grad(top).logsumexp(-1).sum(), top)[0]
        for i in reversed(range(model.n_layers)):
            with model.layer(i) as layer:
                x = states.pop().requires_grad_()
                gradient = torch.autograd.grad(model.run_layer_with_grad(layer, x), x, gradient)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
        with model.layer(0) as layer:
            assert not model.run_layer(layer, x).requires_grad
        assert not model.head(top).requires_grad
        assert all(tap.__dict__["give"] is None for tap in model._taps)


def test_rotary_frequencies_stay_float32(folders: dict[str, Path]) -> None:
    with StreamedModel.open(open_checkpoint(folders["moe"]), dtype="bfloat16") as model:
        found = {n: b.dtype for n, b in model._text.rotary_emb.named_buffers()}
        assert set(found.values()) == {torch.float32}


def test_a_missing_tensor_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny(tmp_path / "short", "moe", shards=1)
    state = load_file(folder / "model.safetensors")
    del state["model.language_model.layers.3.post_feedforward_layernorm_2.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.post_feedforward_layernorm_2"):
        streamed_logits(folder, token_ids(1, 5))


def test_a_shape_that_the_module_does_not_have(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["moe"], tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="disagree about the shape"):
        streamed_logits(folder, token_ids(1, 5))


def test_a_file_that_shrank_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["dense"], tmp_path / "cut")
    checkpoint = open_checkpoint(folder)
    name = list(checkpoint.tensors)[-1]
    ref = checkpoint.ref(name)
    with open(folder / ref.shard, "r+b") as f:
        f.truncate(ref.start + 4)
    reader = WeightReader(checkpoint, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="ended before"):
        reader.read(name, ref.shape)


@pytest.mark.parametrize(
    ("options", "said"), [({"dtype": "int8"}, "compute dtype"), ({"experts": "fancy"}, "experts implementation")]
)
def test_unknown_names_are_refused(folders: dict[str, Path], options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        StreamedModel.open(open_checkpoint(folders["moe"]), **options)


def test_shared_kv_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "shared", "dense", num_kv_shared_layers=2)
    with pytest.raises(UsageError, match="shared between layers"):
        StreamedModel.open(open_checkpoint(folder))


def test_conversion_in_pieces_loses_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import gemcut.stream.weights as weights

    monkeypatch.setattr(weights, "_CONVERT_BYTES", 100)
    checkpoint = open_checkpoint(folders["moe"])
    name = "model.language_model.layers.1.experts.down_proj"
    raw = torch.frombuffer(checkpoint.read(name), dtype=torch.bfloat16).reshape(checkpoint.ref(name).shape)
    reader = WeightReader(checkpoint, torch.float32, torch.device("cpu"))
    assert torch.equal(reader.read(name, checkpoint.ref(name).shape), raw.float())
