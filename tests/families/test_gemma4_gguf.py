"""The map of trunk, drafter and vision tower: every tensor once or left out for a reason, heads per layer, refusals."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.gguf_shapes import Shapes, drafter, tower, trunk
from gemcut.errors import CheckpointError, GemcutError, UsageError
from gemcut.families import gguf_layout, gguf_vision_layout
from gemcut.families.gemma4_gguf import rope_freqs
from gemcut.families.gguf import GgufLayout, GgufTensor, Value
from tiny import VOCABULARY, Kind


def holds(layout: GgufLayout, shapes: Shapes) -> None:
    """Every tensor on disk is in the file once, or left out with a reason; shapes hold as many values."""
    used = [tensor.source for tensor in layout.tensors if tensor.source is not None]
    assert len(used) == len(set(used))
    assert sorted([*used, *layout.left_out]) == sorted(shapes)
    assert all(layout.left_out.values())
    assert used == [name for name in shapes if name not in layout.left_out], "the order of the file is the caller's"
    names = [tensor.name for tensor in layout.tensors]
    assert len(names) == len(set(names))
    for tensor in layout.tensors:
        if tensor.source is not None:
            assert np.prod(tensor.shape) == np.prod(shapes[tensor.source]), tensor.name
        if len(tensor.shape) == 1:
            assert tensor.keep_f32, tensor.name


@pytest.mark.parametrize("kind", ["moe", "dense", "moe-text", "dense-text"])
def test_every_tensor_of_a_trunk_has_one_place(kind: Kind) -> None:
    config, shapes = trunk(kind)
    layout = gguf_layout(config, shapes)
    holds(layout, shapes)
    assert not layout.left_out
    assert (layout.layers, layout.experts, layout.group, layout.tied) == (6, 8 if "moe" in kind else 0, 2, True)
    assert "blk.5.attn_v.weight" not in {tensor.name for tensor in layout.tensors}
    assert "blk.4.attn_v.weight" in {tensor.name for tensor in layout.tensors}
    assert list(layout.metadata).count("general.file_type") == 1


def test_the_trunk_leaves_the_tower_out_and_the_tower_the_trunk() -> None:
    config, shapes = tower()
    model, projector = gguf_layout(config, shapes), gguf_vision_layout(config, shapes, {})
    holds(model, shapes)
    holds(projector, shapes)
    assert model.left_out.keys() | projector.left_out.keys() == set(shapes)
    assert not model.left_out.keys() & projector.left_out.keys()


def test_patches_are_a_convolution_and_clips_are_vectors() -> None:
    config, shapes = tower()
    tensors = {t.name: t for t in gguf_vision_layout(config, shapes, {}).tensors}
    patches = tensors["v.patch_embd.weight"]
    assert (patches.shape, patches.source_shape, patches.permute) == ((32, 3, 4, 4), (32, 4, 4, 3), (0, 3, 1, 2))
    assert patches.keep_f32
    assert tensors["v.position_embd.weight"].keep_f32
    clip = tensors["v.blk.0.attn_out.input_max"]
    assert (clip.shape, clip.keep_f32) == ((1,), True)
    assert not tensors["v.blk.0.attn_out.weight"].keep_f32


def test_pooling_is_said_where_llama_cpp_would_take_another() -> None:
    plain, odd = tower(), tower(pooling_kernel_size=2)
    key = "clip.vision.projector.scale_factor"
    assert key not in gguf_vision_layout(*plain, {}).metadata
    assert gguf_vision_layout(*odd, {}).metadata[key] == Value("u32", 2)


def test_the_tower_has_the_models_gelu() -> None:
    assert gguf_vision_layout(*tower(), {}).metadata["clip.use_gelu"] == Value("bool", True)
    with pytest.raises(UsageError, match="gelu_pytorch_tanh"):
        gguf_vision_layout(*tower(hidden_activation="silu"), {})


def test_a_drafter_has_queries_only() -> None:
    config, shapes = drafter()
    shapes["masked_embedding.centroids.weight"] = (16, 32)
    layout = gguf_layout(config, shapes)
    holds(layout, shapes)
    assert layout.left_out.keys() == {"masked_embedding.centroids.weight"}
    assert layout.metadata["gemma4-assistant.attention.head_count_kv"] == Value("i32", (2, 2, 2, 1))
    assert layout.metadata["gemma4-assistant.embedding_length_out"] == Value("u32", 64)


def test_heads_of_every_layer_come_from_the_shapes() -> None:
    config, shapes = trunk("dense", query={1: 2, 5: 4})
    layout = gguf_layout(config, shapes)
    assert layout.metadata["gemma4.attention.head_count"] == Value("i32", (4, 2, 4, 4, 4, 4))
    assert layout.metadata["gemma4.attention.head_count_kv"] == Value("i32", (2, 1, 2, 2, 2, 1))
    even = gguf_layout(*trunk("dense"))
    assert even.metadata["gemma4.attention.head_count"] == Value("u32", 4)


def test_any_number_of_experts() -> None:
    config, shapes = trunk("moe", num_experts=5)
    layout = gguf_layout(config, shapes)
    assert layout.experts == 5
    assert layout.metadata["gemma4.expert_count"] == Value("u32", 5)


def test_an_output_head_of_its_own() -> None:
    config, shapes = trunk("dense-text")
    shapes["lm_head.weight"] = (VOCABULARY, 64)
    layout = gguf_layout({**config, "tie_word_embeddings": False}, shapes)
    assert not layout.tied
    assert "output.weight" in {tensor.name for tensor in layout.tensors}
    del shapes["lm_head.weight"]
    with pytest.raises(CheckpointError, match="output head"):
        gguf_layout({**config, "tie_word_embeddings": False}, shapes)


def test_rope_turns_a_quarter() -> None:
    assert rope_freqs(512, 0.25).tolist() == [1.0] * 64 + [float(np.float32(1e30))] * 192
    assert rope_freqs(32, 1.0).tolist() == [1.0] * 16


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hidden_size_per_layer_input": 256}, "per-layer input"),
        ({"use_double_wide_mlp": True}, "double-wide"),
        ({"attention_bias": True}, "biases"),
        ({"use_bidirectional_attention": "all"}, "sees"),
        ({"quantization_config": {"format": "nvfp4-pack-quantized"}}, "quantised already"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "RoPE"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_tensors(overrides: dict[str, Any], said: str) -> None:
    config, shapes = trunk("dense", **overrides)
    with pytest.raises(UsageError, match=said):
        gguf_layout(config, shapes)


@pytest.mark.parametrize("which", [trunk, drafter, tower])
def test_every_tensor_is_needed_and_every_shape_is_checked(which: Any) -> None:
    """Take away or reshape any tensor that the file holds: the error names it, or layers disagree with their heads."""
    config, shapes = which()

    def build(changed: Shapes) -> GgufLayout:
        return gguf_vision_layout(config, changed, {}) if which is tower else gguf_layout(config, changed)

    for tensor in build(shapes).tensors:
        if tensor.source is not None:
            name = tensor.source
            with pytest.raises(CheckpointError) as without:
                build({n: s for n, s in shapes.items() if n != name})
            assert "lacks" in str(without.value) or "layer" in str(without.value)
            with pytest.raises(CheckpointError) as other:
                build({**shapes, name: (*shapes[name], 7)})
            assert name.rpartition(".")[0].rpartition(".")[0] in str(other.value)


@pytest.mark.parametrize("stray", ["model.language_model.layers.6.layer_scalar", "model.language_model.layers.0.extra",
                                   "model.language_model.layers.00.layer_scalar", "mtp.weight"])  # fmt: skip
def test_an_unknown_tensor_is_an_error(stray: str) -> None:
    config, shapes = trunk("moe")
    with pytest.raises(CheckpointError, match="does not have") as error:
        gguf_layout(config, {**shapes, stray: (1,)})
    assert error.value.where == stray


def test_configs_with_anything_in_any_place_end_in_typed_errors() -> None:
    """Every key of every config, replaced by what it must not be: a typed error, or a layout all the same."""
    junk: tuple[Any, ...] = (None, -1, 0, 2**40, "4", [], {}, True, 1.5, [1])
    cases = (trunk("moe"), drafter(), tower())
    for config, shapes in cases:
        for part in ("", "text_config", "vision_config"):
            for key in list((config.get(part) or {}) if part else config):
                for value in junk:
                    changed = json.loads(json.dumps(config))
                    (changed[part] if part else changed)[key] = value
                    for build in (gguf_layout, lambda c, s: gguf_vision_layout(c, s, {})):
                        with contextlib.suppress(GemcutError):
                            build(changed, shapes)


def test_goldens_of_tensors_name_what_the_layout_says() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "converter_moe_model.json").read_text())
    roles = {name.split(".", 2)[2] for name in golden["tensors"] if name.startswith("blk.")}
    ours = {name.split(".", 2)[2] for name in (t.name for t in gguf_layout(*trunk("moe")).tensors) if "blk." in name}
    assert ours == roles
    assert isinstance(gguf_layout(*trunk("moe")).tensors[0], GgufTensor)
