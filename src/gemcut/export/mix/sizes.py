"""What a file will weigh, to the byte, before any of it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.gguf_file.header import ALIGNMENT

_BLOCK = re.compile(r"^blk\.\d+\.")


@dataclass(frozen=True, slots=True)
class KindSize:
    """All tensors of one role. elements: weights, zeros of padding left out.

    bpw: bits of a weight as stored, not as the type's name says.
    """

    role: str
    tensors: int
    elements: int
    size_bytes: int
    types: tuple[GgmlType, ...]

    @property
    def bpw(self) -> float:
        return 8 * self.size_bytes / self.elements


@dataclass(frozen=True, slots=True)
class FileSize:
    """header_bytes: up to the first tensor's data.   payload_bytes: tensors without padding between them.

    elements: weights, zeros of wider experts left out.
    """

    header_bytes: int
    payload_bytes: int
    padding_bytes: int
    elements: int
    kinds: tuple[KindSize, ...]

    @property
    def size_bytes(self) -> int:
        return self.header_bytes + self.payload_bytes + self.padding_bytes

    @property
    def bpw(self) -> float:
        """8 · size / elements: of the whole file, header included."""
        return 8 * self.size_bytes / self.elements


def stored_bytes(kind: GgmlType, tensor: GgufTensor, *, alignment: int = ALIGNMENT) -> int:
    """Bytes of one tensor in the file, padding included.

    Raises:
        UsageError: its rows are not a multiple of the type's block.
    """
    return -(-tensor_bytes(kind, tensor.shape) // alignment) * alignment


def file_size(
    header_bytes: int, types: Mapping[str, GgmlType], layout: GgufLayout, *, alignment: int = ALIGNMENT
) -> FileSize:
    """The file's size and what it is made of, largest role first.

    Args:
        header_bytes: where the first tensor's data begins; types do not change it.
    Raises:
        UsageError: a type does not fit a tensor's rows.
    """
    by_role: dict[str, list[GgufTensor]] = {}
    payload = stored = elements = 0
    for tensor in layout.tensors:
        kind = types[tensor.name]
        payload += tensor_bytes(kind, tensor.shape)
        stored += stored_bytes(kind, tensor, alignment=alignment)
        elements += tensor.weights
        by_role.setdefault(role_of(tensor.name), []).append(tensor)
    kinds = []
    for role, tensors in by_role.items():
        size = sum(tensor_bytes(types[one.name], one.shape) for one in tensors)
        used = tuple(sorted({types[one.name] for one in tensors}))
        kinds.append(KindSize(role, len(tensors), sum(one.weights for one in tensors), size, used))
    kinds.sort(key=lambda one: (-one.size_bytes, one.role))
    return FileSize(header_bytes, payload, stored - payload, elements, tuple(kinds))


def role_of(name: str) -> str:
    """`blk.3.attn_q.weight` → `attn_q`; `blk.3.ffn_gate_inp.scale` → `ffn_gate_inp.scale`."""
    return _BLOCK.sub("", name).removesuffix(".weight")
