"""The shapes that a Gemma 4 config promises, held against those of a checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

from gemcut.errors import CheckpointError
from gemcut.families.gemma4 import has_experts, head_dim, layer_types, top_k
from gemcut.types import Json

Shapes = Mapping[str, tuple[int, ...]]


def number(text: Mapping[str, Json], key: str, default: int | None = None) -> int:
    """A non-negative integer of the config.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = text.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise CheckpointError(
            f"config.json has no usable {key}", where="config.json", got=repr(value)[:60], wanted="a whole number"
        )
    return value


def real(part: Mapping[str, Json], key: str, default: float) -> float:
    """A finite number of the config, `default` where it says none."""
    value = part.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"config.json has no usable {key}", where="config.json", got=repr(value)[:60])
    return float(value)


class Shaper:
    """Looks tensors up by what they must be, and remembers which were used."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def one(self, name: str, wanted: tuple[int, ...]) -> None:
        """Check that a tensor is there and has this shape.

        Raises:
            CheckpointError: it is missing, or has another shape.
        """
        got = self.shapes.get(name)
        if got is None:
            raise CheckpointError("the checkpoint lacks a tensor", where=name, wanted=f"shape {list(wanted)}")
        if got != wanted:
            raise CheckpointError(
                "config.json and the weights disagree", where=name, got=f"shape {list(got)}", wanted=f"{list(wanted)}"
            )

    def heads(self, name: str, width: int, hidden: int) -> int:
        """How many heads of `width` rows a projection [heads·D, H] has."""
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                "the checkpoint lacks a tensor", where=name, wanted=f"shape [heads·{width}, {hidden}]"
            )
        if len(shape) != 2 or shape[1] != hidden or shape[0] % width or not shape[0]:
            raise CheckpointError(
                "config.json and the weights disagree",
                where=name,
                got=f"shape {list(shape)}",
                wanted=f"[heads·{width}, {hidden}]",
            )
        return shape[0] // width


def check_block(
    shaper: Shaper, text: Mapping[str, Json], prefix: str, layer: int, queries_only: bool
) -> tuple[int, int]:
    """Check every shape of one block; return its query heads and KV heads (0 where it has no keys of its own).

    Raises:
        CheckpointError: a tensor is missing or has a shape that the config does not explain.
    """
    hidden, inner = number(text, "hidden_size"), number(text, "intermediate_size")
    width = head_dim(text, layer)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shaper.one(f"{prefix}{norm}_layernorm.weight", (hidden,))
    shaper.one(f"{prefix}layer_scalar", (1,))
    for name in ("gate_proj", "up_proj"):
        shaper.one(f"{prefix}mlp.{name}.weight", (inner, hidden))
    shaper.one(f"{prefix}mlp.down_proj.weight", (hidden, inner))
    attn = f"{prefix}self_attn."
    heads = shaper.heads(f"{attn}q_proj.weight", width, hidden)
    shaper.one(f"{attn}o_proj.weight", (hidden, heads * width))
    shaper.one(f"{attn}q_norm.weight", (width,))
    kv = 0
    if not queries_only and (f"{attn}k_proj.weight" in shaper.shapes or not _shares(text, layer)):
        kv = shaper.heads(f"{attn}k_proj.weight", width, hidden)
        shaper.one(f"{attn}k_norm.weight", (width,))
        full = layer_types(text)[layer] == "full_attention"
        if not (full and text.get("attention_k_eq_v")):
            shaper.one(f"{attn}v_proj.weight", (kv * width, hidden))
        if heads % kv:
            raise CheckpointError(
                "the query heads do not divide among the key-value heads",
                where=f"layer {layer}",
                got=f"{heads} query heads, {kv} KV heads",
            )
    if has_experts(text):
        _check_experts(shaper, text, prefix, hidden)
    return heads, kv


def _shares(text: Mapping[str, Json], layer: int) -> bool:
    return layer >= len(layer_types(text)) - number(text, "num_kv_shared_layers", 0)


def _check_experts(shaper: Shaper, text: Mapping[str, Json], prefix: str, hidden: int) -> None:
    experts, inner = number(text, "num_experts"), number(text, "moe_intermediate_size")
    if not top_k(text) <= experts:
        raise CheckpointError(
            "fewer experts than a token takes", where="config.json", got=f"{experts}", wanted=top_k(text)
        )
    for norm in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
        shaper.one(f"{prefix}{norm}.weight", (hidden,))
    shaper.one(f"{prefix}router.proj.weight", (experts, hidden))
    shaper.one(f"{prefix}router.scale", (hidden,))
    shaper.one(f"{prefix}router.per_expert_scale", (experts,))
    shaper.one(f"{prefix}experts.gate_up_proj", (experts, 2 * inner, hidden))
    shaper.one(f"{prefix}experts.down_proj", (experts, hidden, inner))
