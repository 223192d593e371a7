"""How large the weights may be so that a model runs in the memory of a card: every other term, added up and shown.

KV cache     full layers hold the whole context, sliding layers their window and one batch; both in multiples of 256
             cells; K and V of each cell are stored in the cache's type, V also where it is the same as K
compute      logits of one batch (or what one layer needs, if that is more), three hidden states, and the masks
others       files that lie in the same memory: a projector, a drafter
reserve      what the driver and the runtime take
Source       llama.cpp's src/llama-kv-cache-iswa.cpp; the compute buffers that it reports
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.errors import UsageError
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import BLOCKS, GgmlType, tensor_bytes
from gemcut.gguf_file.header import ALIGNMENT

BATCH = 512  # llama.cpp's micro-batch
RESERVE_BYTES = 512 << 20
_CELLS = 256
_CACHE_TYPES = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q5_1, GgmlType.Q5_0, GgmlType.Q4_1,
    GgmlType.Q4_0, GgmlType.IQ4_NL,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Term:
    """One part of the memory.   how: the arithmetic, in words."""

    name: str
    size_bytes: int
    how: str


@dataclass(frozen=True, slots=True)
class Fit:
    """memory_bytes − Σ terms = weights_bytes: what a GGUF file may weigh."""

    memory_bytes: int
    terms: tuple[Term, ...]
    weights_bytes: int


def weights_budget(
    layout: GgufLayout,
    memory_bytes: int,
    *,
    context: int,
    cache: GgmlType = GgmlType.F16,
    others: Mapping[str, int] | None = None,
    batch: int = BATCH,
    sequences: int = 1,
    reserve_bytes: int = RESERVE_BYTES,
) -> Fit:
    """What is left of the memory for the weights.

    Args:
        context: tokens of one sequence.
        others: files beside the model (name → bytes): a projector, a drafter.
        sequences: that run at once, each with a cache of its own.
    Raises:
        UsageError: a cache type that llama.cpp has not, a number below one, a layout of no text decoder, or nothing is
            left.
    """
    if cache not in _CACHE_TYPES:
        names = ", ".join(kind.name.lower() for kind in _CACHE_TYPES)
        raise UsageError("no such type of a KV cache", got=cache.name.lower(), wanted=f"one of {names}")
    for name, value in (("context", context), ("batch", batch), ("sequences", sequences)):
        if value < 1:
            raise UsageError(f"{name} is too small", got=value, wanted="at least 1")
    terms = (
        *_cache_terms(layout, context, cache, batch, sequences),
        _compute_term(layout, context, batch, sequences),
        *(Term(name, size, "the file") for name, size in (others or {}).items()),
        Term("reserve", reserve_bytes, "driver and runtime"),
    )
    left = memory_bytes - sum(term.size_bytes for term in terms)
    if left < ALIGNMENT:
        largest = max(terms, key=lambda term: term.size_bytes)
        raise UsageError(
            "nothing is left for the weights",
            got=f"{memory_bytes} bytes",
            wanted=f"more than {sum(term.size_bytes for term in terms)} bytes",
            hint=f"the largest part is {largest.name} ({largest.size_bytes} bytes): {largest.how}",
        )
    return Fit(memory_bytes, terms, left)


# ---------------------------------------------------------------- facts of the layout


def _number(layout: GgufLayout, key: str) -> int:
    value = layout.metadata.get(f"{layout.architecture}.{key}")
    if value is None or isinstance(value.value, (tuple, str, bool)):
        raise UsageError("the layout says too little to count its memory", where=f"{layout.architecture}.{key}")
    return int(value.value)


def _per_layer(layout: GgufLayout, key: str) -> tuple[int, ...]:
    value = layout.metadata.get(f"{layout.architecture}.{key}")
    if value is None or isinstance(value.value, str):
        raise UsageError("the layout says too little to count its memory", where=f"{layout.architecture}.{key}")
    found = value.value if isinstance(value.value, tuple) else (value.value,) * layout.layers
    return tuple(int(one) for one in found)


def _vocabulary(layout: GgufLayout) -> int:
    return next(tensor.shape[0] for tensor in layout.tensors if tensor.name == "token_embd.weight")


def _cells(layout: GgufLayout, context: int, batch: int) -> tuple[int, int]:
    """Cells of a full and of a sliding layer's cache, for one sequence."""
    full = _padded(context)
    return full, _padded(min(full, _number(layout, "attention.sliding_window") + batch))


def _padded(cells: int) -> int:
    return -(-cells // _CELLS) * _CELLS


def _cache_terms(layout: GgufLayout, context: int, cache: GgmlType, batch: int, sequences: int) -> tuple[Term, Term]:
    sliding = _per_layer(layout, "attention.sliding_window_pattern")
    heads = _per_layer(layout, "attention.head_count_kv")
    own = layout.layers - _number(layout, "attention.shared_kv_layers")
    widths = (_number(layout, "attention.key_length"), _number(layout, "attention.key_length_swa"))
    cells = _cells(layout, context, batch)
    totals, counts = [0, 0], [0, 0]
    for i in range(own):
        kind = int(bool(sliding[i]))
        row = heads[i] * widths[kind]
        if row % BLOCKS[cache].values:
            where, got = f"layer {i}", f"{heads[i]} KV heads of {widths[kind]}"
            raise UsageError(f"a KV cache of {cache.name.lower()} does not fit these heads", where=where, got=got)
        totals[kind] += sequences * cells[kind] * 2 * tensor_bytes(cache, (row,))
        counts[kind] += 1
    many = f" × {sequences} sequences" if sequences > 1 else ""

    def term(name: str, kind: int) -> Term:
        how = f"{counts[kind]} layers × {cells[kind]} cells × K and V in {cache.name.lower()}{many}"
        return Term(f"KV cache, {name} layers", totals[kind], how)

    return term("full", 0), term("sliding", 1)


def _compute_term(layout: GgufLayout, context: int, batch: int, sequences: int) -> Term:
    hidden, vocabulary = _number(layout, "embedding_length"), _vocabulary(layout)
    inner = 2 * max(_per_layer(layout, "feed_forward_length"))
    if layout.experts:
        inner += 2 * _number(layout, "expert_used_count") * _number(layout, "expert_feed_forward_length")
    masks = 2 * batch * sequences * sum(_cells(layout, context, batch))
    widest = max(vocabulary, inner)
    total = 4 * batch * (widest + 3 * hidden) + masks
    what = "vocabulary" if widest == vocabulary else "feed-forward"
    return Term(
        "compute buffer (estimate)", total, f"{batch} tokens × ({what} {widest} + 3 × hidden {hidden}) and masks"
    )
