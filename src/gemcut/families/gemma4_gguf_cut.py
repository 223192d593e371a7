"""Cuts of a Gemma 4 GGUF file, whoever wrote it: experts are the first axis of every `_exps` tensor and of the router.

The fused gate and up of our own files, and the separate ones that llama.cpp reads as well, are cut alike. What the
router multiplies its input with (`ffn_gate_inp.scale` [H]) has no experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.base import Attention
from gemcut.families.gemma4_gguf import per_layer
from gemcut.families.gguf import Value
from gemcut.families.gguf_cut import GgufCuts, Shapes
from gemcut.types import Site, Slice

_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")
_ROUTER = "ffn_gate_inp.weight"
_ARCH = "gemma4."
_EXPERTS, _TOP_K = f"{_ARCH}expert_count", f"{_ARCH}expert_used_count"
_HEADS, _KV_HEADS = f"{_ARCH}attention.head_count", f"{_ARCH}attention.head_count_kv"


def cuts(metadata: Mapping[str, Value], shapes: Shapes) -> GgufCuts:
    """See `GgufCuts`.

    Raises:
        CheckpointError: the header's numbers and its shapes disagree.
    """
    blocks: dict[int, dict[str, str]] = {}
    for name in shapes:
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[match[2]] = name
    blocks = dict(sorted(blocks.items()))
    sites = _expert_sites(metadata, shapes, blocks)

    def after(new: Shapes) -> Mapping[str, Value]:
        return _after(metadata, shapes, new, blocks, sites)

    return GgufCuts(
        sites, _number(metadata, _TOP_K) if sites else 0, lambda: _attention(metadata, shapes, blocks), after
    )


def _number(metadata: Mapping[str, Value], key: str) -> int:
    found = metadata.get(key)
    if found is None or isinstance(found.value, bool) or not isinstance(found.value, int) or found.value < 0:
        got = "nothing" if found is None else repr(found.value)[:60]
        raise CheckpointError("the GGUF file has no usable number", where=key, got=got)
    return found.value


def _expert_sites(
    metadata: Mapping[str, Value], shapes: Shapes, blocks: Mapping[int, Mapping[str, str]]
) -> dict[int, Site]:
    sites: dict[int, Site] = {}
    for layer, tails in blocks.items():
        names = [name for tail, name in tails.items() if "_exps." in tail]
        if not names:
            continue
        if _ROUTER not in tails:
            raise CheckpointError("a layer has experts and no router", where=f"blk.{layer}.{_ROUTER}")
        experts = _number(metadata, _EXPERTS)
        for name in (*names, tails[_ROUTER]):
            if shapes[name][:1] != (experts,):
                raise CheckpointError(
                    "the header's number of experts and a tensor disagree",
                    where=name,
                    got=f"shape {list(shapes[name])}",
                    wanted=f"[{experts}, …]",
                )
        sites[layer] = Site(layer, "experts", experts, tuple(Slice(n, 0, 1) for n in (*names, tails[_ROUTER])))
    return sites


def _attention(
    metadata: Mapping[str, Value], shapes: Shapes, blocks: Mapping[int, Mapping[str, str]]
) -> dict[int, Attention]:
    shared = metadata.get(f"{_ARCH}attention.shared_kv_layers", Value("u32", 0)).value
    if shared:
        raise UsageError("heads cannot leave a GGUF file whose layers share keys and values", got=f"{shared} layers")
    pattern = metadata.get(f"{_ARCH}attention.sliding_window_pattern", Value("u32", 0)).value
    if not isinstance(pattern, tuple) or len(pattern) != len(blocks) or list(blocks) != list(range(len(pattern))):
        raise CheckpointError(
            "the GGUF file does not say for every layer which attention it has",
            where=f"{_ARCH}attention.sliding_window_pattern",
            wanted=f"{len(blocks)} truth values",
        )
    full, sliding = (_number(metadata, f"{_ARCH}attention.key_length{tail}") for tail in ("", "_swa"))
    out: dict[int, Attention] = {}
    for layer, tails in blocks.items():
        width = sliding if pattern[layer] else full
        q, k, v, o = (f"attn_{part}.weight" for part in ("q", "k", "v", "output"))
        heads, kv = (_heads(shapes, f"blk.{layer}.{tail}", width) for tail in (q, k))
        out[layer] = Attention(
            heads=heads,
            kv_heads=kv,
            head_dim=width,
            full=not pattern[layer],
            q=f"blk.{layer}.{q}",
            k=f"blk.{layer}.{k}",
            v=tails.get(v),
            o=f"blk.{layer}.{o}",
        )
        if shapes.get(f"blk.{layer}.{o}", ())[1:] != (heads * width,) or heads % kv:
            raise CheckpointError(
                "the attention's tensors disagree", where=f"blk.{layer}.{o}", got=f"{heads} query heads, {kv} KV heads"
            )
    return out


def _heads(shapes: Shapes, name: str, width: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) != 2 or not width or not shape[0] or shape[0] % width:
        raise CheckpointError(
            "the header's head width and a tensor disagree", where=name, got=f"shape {list(shape)}", wanted=f"{width}·n"
        )
    return shape[0] // width


def _after(
    metadata: Mapping[str, Value],
    shapes: Shapes,
    new: Shapes,
    blocks: Mapping[int, Mapping[str, str]],
    sites: Mapping[int, Site],
) -> dict[str, Value]:
    out: dict[str, Value] = {}
    routers = {new[blocks[layer][_ROUTER]][0] for layer in sites}
    if len(routers) == 1 and routers != {_number(metadata, _EXPERTS)}:
        out[_EXPERTS] = Value(metadata[_EXPERTS].kind, routers.pop())
    attention = [tails["attn_q.weight"] for tails in blocks.values() if "attn_q.weight" in tails]
    if any(new[name] != shapes[name] for name in attention):
        counted = _attention(metadata, new, blocks).values()
        out[_HEADS] = per_layer(tuple(one.heads for one in counted))
        out[_KV_HEADS] = per_layer(tuple(one.kv_heads for one in counted))
    return out
