"""GGUF bytes put together by hand, so that every number can be a lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

TYPES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "arr": 9, "u64": 10,
         "i64": 11, "f64": 12}  # fmt: skip
FORMS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "B", "u64": "Q",
         "i64": "q", "f64": "d"}  # fmt: skip


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: str, value: Any) -> bytes:
    return text(value) if kind == "str" else struct.pack("<" + FORMS[kind], value)


def pair(key: str | bytes, kind: str | int, value: Any) -> bytes:
    """A scalar; an array where `value` is a list."""
    code = TYPES[kind] if isinstance(kind, str) else kind
    if isinstance(value, bytes):
        return text(key) + struct.pack("<I", code) + value
    assert isinstance(kind, str)
    if isinstance(value, list):
        body = b"".join(scalar(kind, one) for one in value)
        return text(key) + struct.pack("<IIQ", 9, code, len(value)) + body
    return text(key) + struct.pack("<I", code) + scalar(kind, value)


def tensor(name: str | bytes, dims: list[int], kind: int, offset: int, axes: int | None = None) -> bytes:
    """`dims` as the file has them: columns first."""
    head = text(name) + struct.pack("<I", len(dims) if axes is None else axes)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


PAIRS = (
    pair("general.architecture", "str", "gemma4"),
    pair("general.alignment", "u32", 32),
    pair("gemma4.head_count_kv", "i32", [4, 4, 2]),
    pair("tokenizer.ggml.tokens", "str", ["<bos>", "ü", ""]),
    pair("gemma4.pattern", "bool", [1, 0]),
    pair("gemma4.eps", "f32", 1e-6),
)
# Q4_K [2, 3, 256] (864 bytes), F32 [5] (20 bytes), Q8_0 [4, 64]
TENSORS = (
    tensor("blk.0.w.weight", [256, 3, 2], 12, 0),
    tensor("norm.weight", [5], 0, 864),
    tensor("blk.1.w.weight", [64, 4], 8, 896),
)
PAYLOAD_BYTES = 896 + 288


@dataclass
class Raw:
    """The parts of a file; `build` puts them together."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: tuple[bytes, ...] = PAIRS
    tensors: tuple[bytes, ...] = TENSORS
    pair_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    payload: bytes = field(default_factory=lambda: bytes(i % 251 for i in range(PAYLOAD_BYTES)))

    def build(self) -> bytes:
        count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.magic + struct.pack("<IQQ", self.version, count, pairs)
        head += b"".join(self.pairs) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.payload
