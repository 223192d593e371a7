"""What llama.cpp wants of a Gemma 4 drafter (architecture `gemma4-assistant`).

The drafter has queries only and reads the keys and values of its trunk's last sliding and last full layer; its KV head
counts are therefore the trunk's, and come from its config. On disk:

    model.embed_tokens [V, H]   model.layers.N.… without k, v and their norms   model.norm [H]
    pre_projection [H, 2·B]     from the trunk's embedding beside its hidden state   post_projection [B, H]
    B backbone: hidden size of the trunk
Source: llama.cpp conversion/gemma.py and src/models/gemma4-assistant.cpp, the version that constraints.txt pins
"""

from __future__ import annotations

from collections.abc import Mapping

from gemcut.errors import UsageError
from gemcut.families.gemma4 import attention, has_experts, layer_types, text_config
from gemcut.families.gemma4_gguf import BLOCK, Heads, place_all, refuse, rope_tensor, text_metadata
from gemcut.families.gemma4_shapes import Shaper, Shapes, check_block, number
from gemcut.families.gguf import GgufLayout, Value
from gemcut.types import Json

ARCHITECTURE = "gemma4-assistant"
PROJECTIONS: Mapping[str, str] = {
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}
CLUSTERS = "masked_embedding."


def drafter(config: Mapping[str, Json], shapes: Shapes) -> GgufLayout:
    """The GGUF of a multi-token drafter. It runs only beside its trunk.

    Args:
        shapes: every tensor of the checkpoint, in the order of the file.
    Raises:
        UsageError: a drafter that llama.cpp cannot load.
        CheckpointError: shapes and config disagree, a tensor is missing, or one is unknown.
    """
    text = text_config(config)
    refuse(config, text)
    if has_experts(text):
        raise UsageError("a drafter with experts cannot be written as GGUF", where="config.json: enable_moe_block")
    layers, hidden, backbone = (
        len(layer_types(text)),
        number(text, "hidden_size"),
        number(config, "backbone_hidden_size"),
    )
    if hidden == backbone:
        raise UsageError(
            "llama.cpp cannot load a drafter that is as wide as its trunk",
            where="config.json: backbone_hidden_size",
            got=backbone,
        )
    left_out = {name: "clusters of the vocabulary: llama.cpp computes every logit" for name in shapes
                if name.startswith(CLUSTERS)}  # fmt: skip
    kept = {name: shape for name, shape in shapes.items() if name not in left_out}
    shaper = Shaper(kept)
    shaper.one("model.embed_tokens.weight", (number(text, "vocab_size"), hidden))
    shaper.one("model.norm.weight", (hidden,))
    shaper.one("pre_projection.weight", (hidden, 2 * backbone))
    shaper.one("post_projection.weight", (backbone, hidden))
    query = [check_block(shaper, text, f"model.layers.{i}.", i, queries_only=True)[0] for i in range(layers)]
    kv = [attention(text, shapes, i).kv_heads for i in range(layers)]
    tensors, _ = place_all(kept, "model.", lambda _: BLOCK, layers, PROJECTIONS)
    return GgufLayout(
        architecture=ARCHITECTURE,
        metadata={
            **text_metadata(ARCHITECTURE, text, Heads(tuple(query), tuple(kv))),
            f"{ARCHITECTURE}.embedding_length_out": Value("u32", backbone),
            f"{ARCHITECTURE}.nextn_predict_layers": Value("u32", layers),
        },
        tensors=(rope_tensor(text), *tensors),
        layers=layers,
        experts=0,
        group=query[0] // kv[0],
        tied=True,
        left_out=left_out,
    )
