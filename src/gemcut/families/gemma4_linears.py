"""Gemma 4's matrices as NVFP4 checkpoints have them: fused experts come apart, one linear for each of their three.

Source: vLLM model_executor/models/gemma4.py and gemma4_mm.py (hf_to_vllm_mapper, packed_modules_mapping), mid 2026;
llm-compressor 0.14, which writes the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemcut.errors import CheckpointError
from gemcut.families.gemma4 import layer_prefix
from gemcut.families.linears import LinearGroup, LinearPart, Linears, Matrix
from gemcut.types import Json

_PLAIN: tuple[tuple[LinearPart, str, tuple[str, ...]], ...] = (
    ("attention", "self_attn.", ("q_proj", "k_proj", "v_proj")),
    ("attention", "self_attn.", ("o_proj",)),
    ("mlp", "mlp.", ("gate_proj", "up_proj")),
    ("mlp", "mlp.", ("down_proj",)),
)
_EXPERT = ("gate_proj", "up_proj", "down_proj")


def groups(text: Mapping[str, Json], shapes: Mapping[str, tuple[int, ...]]) -> tuple[LinearGroup, ...]:
    """See `families.linears.Linears`."""
    layers = text.get("num_hidden_layers")
    found: list[LinearGroup] = []
    for layer in range(layers if isinstance(layers, int) else 0):
        prefix = layer_prefix(shapes, layer)
        for part, inside, names in _PLAIN:
            there = [name for name in names if f"{prefix}{inside}{name}.weight" in shapes]
            matrices = tuple(_plain(shapes, f"{prefix}{inside}{name}") for name in there)
            if matrices:
                found.append(LinearGroup(layer, part, f"{inside}{there[0]}", 0, matrices))
        found += _experts(shapes, prefix, layer)
    return tuple(found)


def _plain(shapes: Mapping[str, tuple[int, ...]], module: str) -> Matrix:
    tensor = f"{module}.weight"
    shape = shapes[tensor]
    if len(shape) != 2:
        raise CheckpointError("a linear's weight has not two axes", where=tensor, got=list(shape))
    return Matrix(module, tensor, 0, shape[0], shape[1])


def _experts(shapes: Mapping[str, tuple[int, ...]], prefix: str, layer: int) -> Iterator[LinearGroup]:
    gate_up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
    if gate_up not in shapes or down not in shapes:
        return
    if len(shapes[gate_up]) != 3 or len(shapes[down]) != 3 or shapes[gate_up][1] % 2:
        raise CheckpointError("fused experts have another form", where=gate_up, got=list(shapes[gate_up]))
    experts, double, hidden = shapes[gate_up]  # [E, 2I, H]: the first I rows are gate's
    _, rows, width = shapes[down]  # [E, H, I]
    half = double // 2
    for e in range(experts):
        at, module = e * double, f"{prefix}experts.{e}"
        gate = Matrix(f"{module}.gate_proj", gate_up, at, at + half, hidden)
        up = Matrix(f"{module}.up_proj", gate_up, at + half, at + double, hidden)
        yield LinearGroup(layer, "experts", "experts.gate_up_proj", e, (gate, up))
        one = Matrix(f"{module}.down_proj", down, e * rows, (e + 1) * rows, width)
        yield LinearGroup(layer, "experts", "experts.down_proj", e, (one,))


def stored(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """See `families.linears.Linears`."""
    out: dict[str, tuple[int, ...]] = {}
    experts: dict[str, dict[str, dict[int, tuple[int, int]]]] = {}  # path of the experts → projection → expert
    for module, shape in linears.items():
        before, inside, which = module.partition(".experts.")
        if not inside:
            out[f"{module}.weight"] = shape
            continue
        number, _, name = which.partition(".")
        if name not in _EXPERT or not (number.isdecimal() and len(number) < 9):
            raise CheckpointError("a linear among the experts has a strange name", where=module[:200])
        parts = experts.setdefault(f"{before}.experts", {name: {} for name in _EXPERT})
        parts[name][int(number)] = shape
    for path, parts in experts.items():
        count = max(len(there) for there in parts.values())
        for name, there in parts.items():
            if missing := [e for e in range(count) if e not in there]:
                raise CheckpointError("an expert is missing", where=f"{path}.{missing[0]}.{name}")
            if len(set(there.values())) > 1 or there[0] != parts["gate_proj" if name == "up_proj" else name][0]:
                raise CheckpointError("experts of one layer have different shapes", where=f"{path}: {name}")
        rows, columns = parts["gate_proj"][0]
        out[f"{path}.gate_up_proj"] = (count, 2 * rows, columns)
        out[f"{path}.down_proj"] = (count, *parts["down_proj"][0])
    return out


LINEARS = Linears(
    groups=groups,
    stored=stored,
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    served=(
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.embed_vision.", "embed_vision."),
        ("model.audio_tower.", "audio_tower."),
        ("model.embed_audio.", "embed_audio."),
    ),
    experts_at="moe.",
)
