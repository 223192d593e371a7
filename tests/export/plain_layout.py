"""A layout of any checkpoint, without knowing its architecture: every tensor under a short name, as it lies on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.export.targets import Importances, Planned, Target, plan_target
from gemcut.families.gguf import GgufLayout, GgufTensor, Value
from gemcut.ggml.types import GgmlType, fits
from gemcut.types import F32

METADATA = {"general.architecture": Value("str", "none"), "general.file_type": Value("u32", 0)}
QUANTISER = "test"


def plain_layout(checkpoint: Checkpoint, limit: int | None = None) -> GgufLayout:
    """The first `limit` tensors; blocks by their place, names by their number, and one made of values."""
    refs = list(checkpoint.tensors.values())[:limit]
    tensors = [
        GgufTensor(f"blk.{i}.t.weight", ref.shape, ref.name, layer=i, role="t", keep_f32=len(ref.shape) < 2)
        for i, ref in enumerate(refs)
    ]
    made = GgufTensor("made.weight", (40,), None, values=np.linspace(0, 1, 40, dtype=np.float32), keep_f32=True)
    return GgufLayout("none", {}, (*tensors, made), len(tensors), 0, 1, tied=True)


def plain_types(layout: GgufLayout, kind: GgmlType) -> dict[str, GgmlType]:
    """`kind` wherever it fits, Q8_0 or F16 elsewhere, F32 for vectors."""
    out = {}
    for tensor in layout.tensors:
        wide = GgmlType.Q8_0 if tensor.shape[-1] % 32 == 0 else GgmlType.F16
        out[tensor.name] = GgmlType.F32 if tensor.keep_f32 else kind if fits(kind, tensor.shape[-1]) else wide
    return out


def planned(
    checkpoint: Checkpoint,
    layout: GgufLayout,
    kinds: Mapping[str, GgmlType],
    importances: Importances | None = None,
    max_shard_bytes: int | None = None,
) -> list[Planned]:
    """One target for each name, of one type throughout."""
    return [
        plan_target(
            Target(f"{name}.gguf", plain_types(layout, kind), METADATA, importances),
            layout,
            parent=checkpoint.fingerprint,
            quantiser=QUANTISER,
            max_shard_bytes=max_shard_bytes,
        )
        for name, kind in kinds.items()
    ]


class Flat:
    """Importances that rise along the columns, other ones for each unit."""

    def __init__(self, layout: GgufLayout, lowest: float = 0.1) -> None:
        self._columns = {tensor.name: tensor.shape[-1] for tensor in layout.tensors}
        self._lowest = lowest

    def importance(self, name: str, unit: int = 0) -> F32 | None:
        return np.linspace(self._lowest, 1 + unit, self._columns[name], dtype=np.float32)


def demo(name: str) -> Checkpoint:
    return open_checkpoint(Path(__file__).parents[2] / "demo" / name)
