"""How much memory an observation takes, from headers and settings alone."""

from __future__ import annotations

from collections.abc import Mapping

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import MissingError
from gemcut.observe.settings import SPLITS, ObserveSettings, gram_splits
from gemcut.types import QUESTION_SUMS, Json

_BASE_BYTES = 640 << 20  # interpreter, torch, transformers and their first matrix product, measured on Linux
_STAGED_ROWS = 2048
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_STORED_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


def observe_memory_bytes(checkpoint: Checkpoint, settings: ObserveSettings, *, longest: int = 0) -> int:
    """Upper estimate of the process's resident memory at its peak, in bytes.

    max(one decoder layer + its sums + one batch, embedding + one batch, sums twice while they are written) + base

    Args:
        longest: tokens of the corpus' longest item, where it is longer than a batch.
    """
    text = checkpoint.text_config
    item = _item_bytes(checkpoint, settings)
    layers = _number(text, "num_hidden_layers")
    prefixes = [checkpoint.family.layer_prefix(checkpoint.tensors.keys(), i) for i in range(layers)]
    weights: dict[str, int] = dict.fromkeys(prefixes, 0)
    ends = 0
    for name, ref in checkpoint.tensors.items():
        layer = next((p for p in (name[: name.find(".", name.find("layers.") + 7) + 1],) if p in weights), None)
        if layer is not None:
            weights[layer] += ref.elements * item
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            ends += ref.elements * item
    widest = max(checkpoint.ref(f"{p}self_attn.o_proj.weight").shape[1] for p in prefixes)
    sums = _sums_bytes(text, widest)
    batch = _batch_bytes(text, widest, max(settings.batch_tokens, longest), longest or settings.batch_tokens, item)
    # while a layer runs, half of its Gram matrix is there; when it is mirrored and written, the weights are gone
    splits = gram_splits(widest)
    running = sums - splits * (widest * widest * 4 - _STAGED_ROWS * widest * 4)
    return _BASE_BYTES + max(max(weights.values()) + running + batch, ends + batch, 2 * sums)


def observe_disk_bytes(checkpoint: Checkpoint, settings: ObserveSettings, *, tokens: int, questions: int) -> int:
    """Upper estimate of what an observation writes: two files of hidden states at once, and the statistics.

    The Gram matrices are most of the statistics of a large model: d² float64 values a layer, d = width of o_proj's
    input, twice where both halves of the corpus are kept apart.
    """
    text = checkpoint.text_config
    experts = _number(text, "num_experts")
    out = 2 * tokens * _number(text, "hidden_size") * _item_bytes(checkpoint, settings)
    for i in range(_number(text, "num_hidden_layers")):
        prefix = checkpoint.family.layer_prefix(checkpoint.tensors.keys(), i)
        out += _sums_bytes(text, checkpoint.ref(f"{prefix}self_attn.o_proj.weight").shape[1])
        out += experts * len(QUESTION_SUMS) * questions * 4
    return out


def refuse_memory(settings: ObserveSettings, needed: int) -> None:
    """MissingError where the budget is below the estimate."""
    if settings.max_memory is not None and needed > settings.max_memory:
        raise MissingError(
            "max_memory is too small for this observation",
            got=f"{settings.max_memory / 2**30:.2f} GiB",
            wanted=f"at least {needed / 2**30:.2f} GiB: one layer, one batch and the sums",
            hint="raise max_memory, or lower batch_tokens or max_tokens_per_item",
        )


def _item_bytes(checkpoint: Checkpoint, settings: ObserveSettings) -> int:
    if settings.dtype is not None:
        return _BYTES.get(settings.dtype, 4)
    stored = (r.dtype for name, r in checkpoint.tensors.items() if name.endswith("embed_tokens.weight"))
    return _STORED_BYTES.get(next(stored, "F32"), 4)


def _number(text: Mapping[str, Json], key: str) -> int:
    value = text.get(key)
    return value if isinstance(value, int) else 0


def _sums_bytes(text: Mapping[str, Json], widest: int) -> int:
    hidden, experts = _number(text, "hidden_size"), _number(text, "num_experts")
    columns = 2 * hidden + widest + _number(text, "intermediate_size")
    columns += experts * (hidden + _number(text, "moe_intermediate_size"))
    return columns * (3 * SPLITS * 8 + 4) + gram_splits(widest) * widest * widest * 8 + 2 * experts * experts * 8


def _batch_bytes(text: Mapping[str, Json], widest: int, tokens: int, length: int, item: int) -> int:
    hidden, inner = _number(text, "hidden_size"), _number(text, "intermediate_size")
    per_token = hidden * (5 * item + 4 * 4) + widest * (5 * item + 4) + inner * 4 * item
    per_token += _number(text, "num_experts") * 4 * 4 + _number(text, "top_k_experts") * 64
    return tokens * per_token + 6 * length * length
