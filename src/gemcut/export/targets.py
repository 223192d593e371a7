"""One GGUF file to be written: its types, importances and keys, what it will weigh, and by what it is found again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from blake3 import blake3

from gemcut.errors import UsageError
from gemcut.export.imatrix.blocks import Roundings
from gemcut.export.mix.stock import file_order
from gemcut.families.gguf import GgufLayout, GgufTensor, Value
from gemcut.ggml.quantise import requires_imatrix
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import Layout, lay_out_split
from gemcut.store import MAX_NAME_BYTES, fingerprint
from gemcut.types import F32

# Types whose bytes do not depend on importances: nothing is searched, or llama.cpp does not look at them.
WITHOUT_IMPORTANCE = frozenset(
    {
        GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.MXFP4,
        GgmlType.NVFP4,
    }
)  # fmt: skip
_ROOM_BYTES = 32  # what parts, records and journals have behind a file's name


class Importances(Protocol):
    """What the exporter asks of an importance matrix."""

    def importance(self, name: str, unit: int = 0) -> F32 | None:
        """float32 [columns] of one expert of a tensor; None where nothing is known of the tensor."""


@runtime_checkable
class Picking(Protocol):
    """Importances that also say what each block is picked from."""

    def blocks(self, name: str, unit: int = 0) -> Roundings | None:
        """None where a tensor is quantised once."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One file.

    name: of the file, ending in .gguf.   types: of every tensor of the layout.   metadata: all keys, in order.
    """

    name: str
    types: Mapping[str, GgmlType]
    metadata: Mapping[str, Value]
    importances: Importances | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A target laid out: nothing about its size is left to chance.

    importance: tensor → hash of its importances, "" where they change nothing.   settings: hash of all that decides
    the file but the weights' own bytes, which the checkpoint's fingerprint stands for.   elements: weights, zeros of
    padded experts left out.
    """

    target: Target
    parts: tuple[Layout, ...]
    importance: Mapping[str, str]
    settings: str
    elements: int

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensors, padding left out."""
        return sum(ref.size_bytes for part in self.parts for ref in part.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """As achieved, norms and embedding included: 8 · payload bytes / elements."""
        return 8 * self.payload_bytes / max(self.elements, 1)


def plan_target(
    target: Target,
    layout: GgufLayout,
    *,
    parent: str,
    quantiser: str,
    max_shard_bytes: int | None = None,
) -> Planned:
    """Lay a target out and check it, before any weight is read.

    Tensors stand in llama-quantize's order: by block, then by name.

    Args:
        parent: fingerprint of the checkpoint.   quantiser: identity of the library.
    Raises:
        UsageError: a tensor has no type, a type does not fit it or needs importances that are not there.
    """
    if not target.name.endswith(".gguf") or "/" in target.name:
        raise UsageError("not the name of a GGUF file", got=target.name, wanted="NAME.gguf")
    longest = len(os.fsencode(target.name)) + _ROOM_BYTES
    if longest > MAX_NAME_BYTES:
        hint = f"give the model's folder a name that is {longest - MAX_NAME_BYTES} bytes shorter"
        raise UsageError("the file's name is too long", got=f"{target.name[:60]}…", hint=hint)
    tensors = sorted(layout.tensors, key=lambda tensor: file_order(tensor.name))
    missing = next((tensor.name for tensor in tensors if tensor.name not in target.types), None)
    if missing is not None:
        raise UsageError("the mix gives a tensor no type", where=f"{missing} in {target.name}")
    entries = [(tensor.name, target.types[tensor.name], tensor.shape) for tensor in tensors]
    parts = lay_out_split(target.metadata, entries, max_shard_bytes, name=target.name)
    importance = {tensor.name: _importance_hash(tensor, target) for tensor in tensors}
    settings = fingerprint(
        {
            "parent": parent,
            "quantiser": quantiser,
            "headers": [blake3(part.header).hexdigest() for part in parts],
            "importance": importance,
        }
    )
    return Planned(target, parts, importance, settings, sum(tensor.weights for tensor in tensors))


def units(tensor: GgufTensor) -> int:
    """Experts of a fused tensor, each with importances of its own; else 1."""
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def _importance_hash(tensor: GgufTensor, target: Target) -> str:
    kind = target.types[tensor.name]
    if kind in WITHOUT_IMPORTANCE:
        return ""
    found = [importance_of(target, tensor, unit) for unit in range(units(tensor))]
    given = [one for one in found if one is not None]
    if not given:
        if requires_imatrix(kind):
            raise UsageError(
                f"{kind.name} needs an importance matrix",
                where=f"{tensor.name} in {target.name}",
                hint="give --imatrix, or another type",
            )
        return ""
    if len(given) != len(found):
        raise UsageError("the importance matrix lacks experts", where=f"{tensor.name} in {target.name}")
    digest = blake3()
    for unit, one in enumerate(given):
        digest.update(one.view(np.uint8).data)
        picked = blocks_of(target, tensor, unit)
        for part in () if picked is None else (*picked.importances, picked.mean, picked.spread):
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def importance_of(target: Target, tensor: GgufTensor, unit: int) -> F32 | None:
    """Importances of one unit, checked against the tensor's columns."""
    if target.importances is None:
        return None
    found = target.importances.importance(tensor.name, unit)
    if found is not None and found.shape != tensor.shape[-1:]:
        raise UsageError(
            "the importance matrix is of another model",
            where=tensor.name,
            got=f"{found.shape[0]} columns",
            wanted=tensor.shape[-1],
        )
    return found


def blocks_of(target: Target, tensor: GgufTensor, unit: int) -> Roundings | None:
    """What the blocks of one unit are picked from; None where they are quantised once."""
    return target.importances.blocks(tensor.name, unit) if isinstance(target.importances, Picking) else None


def count_types(types: Mapping[str, GgmlType], names: Sequence[str]) -> dict[str, int]:
    """Type → tensors that have it, most first."""
    counts: dict[str, int] = {}
    for name in names:
        kind = types[name].name
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
