"""What llama.cpp wants of a Gemma 4 vision tower: the mmproj file (architecture `clip`, projector `gemma4v`).

Patches      input_proj [W, P·P·3] has rows of pixels with their three colours together; the file wants a convolution
             [W, 3, P, P]: the columns are taken apart as [P, P, 3] and turned. It stays float32
Positions    position_embedding_table [2, N, W], one table for x and one for y, float32
Clipping     the `input_min`, `output_max` … of clipped projections are scalars on disk and vectors of one in the file
Pooling      llama.cpp pools 3 x 3 unless clip.vision.projector.scale_factor says otherwise
GELU         the model has the tanh form; llama.cpp takes x · sigmoid(1.702 x) unless clip.use_gelu is set. llama.cpp's
             converter does not set it: embeddings of its files are 0.4 % off, those with the key 0.005 %
             W width of the tower   P pixels of a patch's side
Source       llama.cpp conversion/gemma.py and tools/mtmd/clip.cpp, the version that constraints.txt pins
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gemma4 import text_config
from gemcut.families.gemma4_gguf import keeps_f32
from gemcut.families.gemma4_shapes import Shaper, Shapes, number, real
from gemcut.families.gguf import GgufLayout, GgufTensor, Value
from gemcut.types import Json

TOWER = "model.vision_tower."
PROJECTOR = "model.embed_vision.embedding_projection.weight"
PATCHES = f"{TOWER}patch_embedder.input_proj.weight"
POSITIONS = f"{TOWER}patch_embedder.position_embedding_table"
COLOURS = 3
POOLED = 3
THETA = 100.0
GELU = "gelu_pytorch_tanh"

_LAYER = re.compile(r"^model\.vision_tower\.encoder\.layers\.(0|[1-9]\d*)\.(.+)$")
_NORMS: Mapping[str, str] = {
    "input_layernorm.weight": "ln1.weight",
    "post_attention_layernorm.weight": "attn_post_norm.weight",
    "pre_feedforward_layernorm.weight": "ln2.weight",
    "post_feedforward_layernorm.weight": "ffn_post_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
_LINEARS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CLIPS = ("input_min", "input_max", "output_min", "output_max")
_OTHER_FILES = (
    ("model.language_model.", "decoder: it goes into the model file"),
    ("lm_head.", "decoder: it goes into the model file"),
    ("model.audio_tower.", "audio tower: gemcut writes no file for it"),
    ("model.embed_audio.", "projector of the audio tower: gemcut writes no file for it"),
)


def vision(config: Mapping[str, Json], shapes: Shapes, preprocessor: Mapping[str, Json]) -> GgufLayout:
    """The mmproj file of a checkpoint with a vision tower.

    Args:
        shapes: every tensor of the checkpoint, in the order of the file.
        preprocessor: the image part of processor_config.json; without mean and deviation, the class's own (0 and 1).
    Raises:
        UsageError: there is no vision tower, or one that llama.cpp cannot run.
        CheckpointError: shapes and config disagree, a tensor is missing, or one is unknown.
    """
    tower = config.get("vision_config")
    if not isinstance(tower, dict):
        raise UsageError("this checkpoint has no vision tower", where="config.json: vision_config")
    _refuse(config, tower)
    hidden = number(text_config(config), "hidden_size")
    width, layers, side = (number(tower, key) for key in ("hidden_size", "num_hidden_layers", "patch_size"))
    shaper = Shaper(shapes)
    shaper.one(PROJECTOR, (hidden, width))
    shaper.one(PATCHES, (width, side * side * COLOURS))
    shaper.one(POSITIONS, (2, number(tower, "position_embedding_size"), width))
    if tower.get("standardize"):
        shaper.one(f"{TOWER}std_bias", (width,))
        shaper.one(f"{TOWER}std_scale", (width,))
    for layer in range(layers):
        _check_block(shaper, tower, f"{TOWER}encoder.layers.{layer}.", width)
    tensors, left_out = _place(shapes, layers, width, side)
    return GgufLayout(
        architecture="clip",
        metadata=_metadata(tower, hidden, preprocessor),
        tensors=tensors,
        layers=layers,
        experts=0,
        group=1,
        tied=False,
        left_out=left_out,
    )


def _refuse(config: Mapping[str, Json], tower: Mapping[str, Json]) -> None:
    heads = number(tower, "num_attention_heads")
    said = tower.get("rope_parameters")
    theta = real(said, "rope_theta", THETA) if isinstance(said, dict) else THETA
    cases = (
        (config.get("quantization_config"), "quantization_config", "this checkpoint is quantised already"),
        (number(tower, "num_key_value_heads", heads) != heads, "vision_config.num_key_value_heads",
         "a vision tower with shared KV heads cannot be written as GGUF"),
        (theta != THETA, "vision_config.rope_parameters", f"llama.cpp has a fixed RoPE base of {THETA:g} here"),
        (tower.get("attention_bias"), "vision_config.attention_bias", "biases cannot be written as GGUF"),
        (tower.get("hidden_activation", GELU) != GELU, "vision_config.hidden_activation",
         f"the vision tower of this architecture has {GELU}"),
    )  # fmt: skip
    for refused, key, what in cases:
        if refused:
            raise UsageError(what, where=f"config.json: {key}")


def _metadata(tower: Mapping[str, Json], hidden: int, preprocessor: Mapping[str, Json]) -> dict[str, Value]:
    out = {
        "general.file_type": Value("u32", 0),
        "clip.has_vision_encoder": Value("bool", True),
        "clip.vision.projection_dim": Value("u32", hidden),
        "clip.vision.image_size": Value("u32", 224),  # read by no one for this projector
        "clip.vision.patch_size": Value("u32", number(tower, "patch_size")),
        "clip.vision.embedding_length": Value("u32", number(tower, "hidden_size")),
        "clip.vision.feed_forward_length": Value("u32", number(tower, "intermediate_size")),
        "clip.vision.block_count": Value("u32", number(tower, "num_hidden_layers")),
        "clip.vision.attention.head_count": Value("u32", number(tower, "num_attention_heads")),
        "clip.vision.image_mean": Value("f32", _colours(preprocessor, "image_mean", 0.0)),
        "clip.vision.image_std": Value("f32", _colours(preprocessor, "image_std", 1.0)),
        "clip.vision.projector_type": Value("str", "gemma4v"),
        "clip.vision.attention.layer_norm_epsilon": Value("f32", real(tower, "layer_norm_eps", 1e-6)),
        "clip.use_gelu": Value("bool", True),
    }
    pooled = number(tower, "pooling_kernel_size", POOLED)
    if pooled != POOLED:
        out["clip.vision.projector.scale_factor"] = Value("u32", pooled)
    return out


def _colours(preprocessor: Mapping[str, Json], key: str, default: float) -> tuple[float, ...]:
    said = preprocessor.get(key)
    if said is None:
        return (default,) * COLOURS
    values = said if isinstance(said, list) else []
    good = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(good) != COLOURS or len(values) != COLOURS:
        raise CheckpointError(
            f"the picture processor has no usable {key}",
            where="processor_config.json",
            got=repr(said)[:60],
            wanted="3 numbers",
        )
    return tuple(good)


def _check_block(shaper: Shaper, tower: Mapping[str, Json], prefix: str, width: int) -> None:
    inner, head = number(tower, "intermediate_size"), number(tower, "head_dim")
    rows = number(tower, "num_attention_heads") * head
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shaper.one(f"{prefix}{norm}_layernorm.weight", (width,))
    for norm in ("q_norm", "k_norm"):
        shaper.one(f"{prefix}self_attn.{norm}.weight", (head,))
    linears = {**dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (rows, width)),
               "self_attn.o_proj": (width, rows), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
               "mlp.down_proj": (width, inner)}  # fmt: skip
    for name, shape in linears.items():
        shaper.one(f"{prefix}{name}.linear.weight", shape)
        if tower.get("use_clipped_linears"):
            for clip in _CLIPS:
                shaper.one(f"{prefix}{name}.{clip}", ())


def _place(shapes: Shapes, layers: int, width: int, side: int) -> tuple[tuple[GgufTensor, ...], dict[str, str]]:
    """A place for every tensor of the tower, in the order of `shapes`; the others with the reason."""
    tensors: list[GgufTensor] = []
    left_out: dict[str, str] = {}
    outside = {PROJECTOR: "mm.input_projection.weight", POSITIONS: "v.position_embd.weight",
               f"{TOWER}std_bias": "v.std_bias", f"{TOWER}std_scale": "v.std_scale"}  # fmt: skip
    for source, shape in shapes.items():
        if source == PATCHES:
            tensors.append(
                GgufTensor(
                    "v.patch_embd.weight",
                    (width, COLOURS, side, side),
                    source,
                    role="patch_embd",
                    source_shape=(width, side, side, COLOURS),
                    permute=(0, 3, 1, 2),
                    keep_f32=True,
                )
            )
            continue
        layer, name = _block_name(source, layers)
        name = outside.get(source) if layer is None else name
        if name is not None:
            role = name.removeprefix("v.").removeprefix(f"blk.{layer}.").removesuffix(".weight")
            f32 = keeps_f32(name, shape) or source == POSITIONS
            tensors.append(GgufTensor(name, shape or (1,), source, layer=layer, role=role, keep_f32=f32))
            continue
        reason = next((why for start, why in _OTHER_FILES if source.startswith(start)), None)
        if reason is None:
            raise CheckpointError(
                "a tensor that this architecture does not have", where=source[:200], got=f"shape {list(shape)}"
            )
        left_out[source] = reason
    return tuple(tensors), left_out


def _block_name(source: str, layers: int) -> tuple[int | None, str | None]:
    match = _LAYER.match(source)
    if match is None or int(match[1]) >= layers:
        return None, None
    layer, tail = int(match[1]), match[2]
    linear, _, what = tail.removesuffix(".linear.weight").rpartition(".")
    if tail in _NORMS:
        name = _NORMS[tail]
    elif tail.endswith(".linear.weight") and f"{linear}.{what}" in _LINEARS:
        name = f"{_LINEARS[f'{linear}.{what}']}.weight"
    elif linear in _LINEARS and what in _CLIPS:
        name = f"{_LINEARS[linear]}.{what}"
    else:
        return None, None
    return layer, f"v.blk.{layer}.{name}"
