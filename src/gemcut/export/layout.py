"""From a checkpoint to what its GGUF files hold, with the tensors in the order of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping

from gemcut.checkpoint.read import Checkpoint
from gemcut.export.tokenizer import read_object
from gemcut.families import gguf_layout, gguf_vision_layout
from gemcut.families.gguf import GgufLayout
from gemcut.nvfp4.layout import QUANTIZATION, is_nvfp4
from gemcut.types import Json


def ordered_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors: shard by shard, and inside a shard by name."""
    refs = checkpoint.tensors.values()
    return {ref.name: ref.shape for ref in sorted(refs, key=lambda ref: (ref.shard, ref.name))}


def layout_of(checkpoint: Checkpoint) -> GgufLayout:
    """The model file of a trunk or a drafter. Raises as the family does."""
    return gguf_layout(checkpoint.config, ordered_shapes(checkpoint))


def vision_layout_of(checkpoint: Checkpoint) -> GgufLayout:
    """The mmproj file of a checkpoint with a vision tower. Raises as the family does."""
    config = plain_config(checkpoint.config) if is_nvfp4(checkpoint.config) else checkpoint.config  # no tower is NVFP4
    return gguf_vision_layout(config, ordered_shapes(checkpoint), preprocessor(checkpoint))


def plain_config(config: Mapping[str, Json]) -> dict[str, Json]:
    """config.json of the model that an NVFP4 checkpoint is of."""
    return {key: value for key, value in config.items() if key != QUANTIZATION}


def preprocessor(checkpoint: Checkpoint) -> Mapping[str, Json]:
    """How pictures are prepared: preprocessor_config.json, overruled by processor_config.json; the picture part of
    either lies at the top or under a key of its own."""
    out: dict[str, Json] = {}
    for file, part in (("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor")):
        said = read_object(checkpoint.path, file)
        inner = said.get(part)
        out |= said | (inner if isinstance(inner, dict) else {})
    return out
