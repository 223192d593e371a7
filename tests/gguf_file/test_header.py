"""A GGUF header is believed in nothing: every lie is a CheckpointError, and never another exception."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from pathlib import Path

import pytest

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gguf import Value
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import open_gguf, read_gguf
from gguf_file.raw_gguf import PAIRS, PAYLOAD_BYTES, TENSORS, Raw, pair, tensor, text


def refuse(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    str(caught.value).encode()  # a message that can be printed
    return str(caught.value)


def test_reads_shapes_rows_first_and_values_with_their_types(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw = Raw().build()
    path.write_bytes(raw)
    found = read_gguf(path)
    assert {ref.name: (ref.kind, ref.shape) for ref in found.tensors.values()} == {
        "blk.0.w.weight": (GgmlType.Q4_K, (2, 3, 256)),
        "norm.weight": (GgmlType.F32, (5,)),
        "blk.1.w.weight": (GgmlType.Q8_0, (4, 64)),
    }
    assert found.metadata["gemma4.head_count_kv"] == Value("i32", (4, 4, 2))
    assert found.metadata["tokenizer.ggml.tokens"] == Value("str", ("<bos>", "ü", ""))
    assert found.metadata["gemma4.pattern"] == Value("bool", (True, False))
    assert found.size_bytes == len(raw)
    assert found.data_start == len(raw) - PAYLOAD_BYTES
    assert found.read("norm.weight").tobytes() == raw[found.data_start + 864 : found.data_start + 884]
    assert found.read_range("blk.1.w.weight", 3, 7).tobytes() == raw[found.data_start + 899 : found.data_start + 903]
    with pytest.raises(CheckpointError, match="outside the tensor"):
        found.read_range("norm.weight", 0, 21)


def test_agrees_with_the_format_s_own_reader(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tmp_path / "m.gguf"
    path.write_bytes(Raw().build())
    theirs = GGUFReader(path)
    ours = read_gguf(path)
    assert [(t.name, int(t.tensor_type), t.data_offset, t.n_bytes) for t in theirs.tensors] == [
        (t.name, int(t.kind), t.start, t.size_bytes) for t in ours.tensors.values()
    ]


def replaced(position: int, new: bytes) -> tuple[bytes, ...]:
    return (*TENSORS[:position], new, *TENSORS[position + 1 :])


def aligned(value: bytes) -> tuple[bytes, ...]:
    return (PAIRS[0], value, *PAIRS[2:])


LIES = {
    "magic": (Raw(magic=b"FUGG"), "not a GGUF file"),
    "magic of a run that broke off": (Raw(magic=bytes(4)), "never finished"),
    "version 0": (Raw(version=0), "big-endian"),
    "version 1": (Raw(version=1), "unknown version"),
    "a later version": (Raw(version=4), "unknown version"),
    "big endian": (Raw(version=3 << 24), "big-endian"),
    "tensors beyond the file": (Raw(tensor_count=2**64 - 1), "more entries than the file"),
    "pairs beyond the file": (Raw(pair_count=2**64 - 1), "more entries than the file"),
    "one tensor too many": (Raw(tensor_count=4), "at|name|ends"),
    "one pair too many": (Raw(pair_count=7), "file ends inside"),
    "key length": (Raw(pairs=(*PAIRS, text("k", 2**64 - 1))), "file ends inside a metadata key"),
    "key length beyond int64": (Raw(pairs=(*PAIRS, text("k", 2**63))), "file ends inside a metadata key"),
    "empty key": (Raw(pairs=(*PAIRS, pair("", "u32", 1))), "empty"),
    "long key": (Raw(pairs=(*PAIRS, pair("k" * 70_000, "u32", 1))), "too long"),
    "key is not UTF-8": (Raw(pairs=(*PAIRS, pair(b"\xff", "u32", 1))), "not UTF-8"),
    "repeated key": (Raw(pairs=(*PAIRS, PAIRS[5])), "repeated"),
    "type 13": (Raw(pairs=(*PAIRS, pair("k", 13, b"\0"))), "unknown type of a metadata value"),
    "type -1": (Raw(pairs=(*PAIRS, pair("k", 2**32 - 1, b"\0"))), "unknown type of a metadata value"),
    "array of arrays": (Raw(pairs=(*PAIRS, pair("k", 9, struct.pack("<IQ", 9, 1)))), "array of arrays"),
    "array of an unknown type": (Raw(pairs=(*PAIRS, pair("k", 9, struct.pack("<IQ", 77, 1)))), "unknown type"),
    "array length": (Raw(pairs=(*PAIRS, pair("k", 9, struct.pack("<IQ", 4, 2**62)))), "more members"),
    "array of strings": (Raw(pairs=(*PAIRS, pair("k", 9, struct.pack("<IQ", 8, 2**61)))), "more members"),
    "string length": (Raw(pairs=(*PAIRS, pair("k", 8, struct.pack("<Q", 2**40)))), "file ends inside the value of k"),
    "value is not UTF-8": (Raw(pairs=(*PAIRS, pair("k", 8, text(b"\xc3")))), "not UTF-8"),
    "truth value": (Raw(pairs=(*PAIRS, pair("k", "bool", 2))), "neither 0 nor 1"),
    "alignment 0": (Raw(pairs=aligned(pair("general.alignment", "u32", 0))), "power of two"),
    "alignment 13": (Raw(pairs=aligned(pair("general.alignment", "u32", 13))), "power of two"),
    "alignment is an i32": (Raw(pairs=aligned(pair("general.alignment", "i32", 32))), "not a u32"),
    "alignment is an array": (Raw(pairs=aligned(pair("general.alignment", "u32", [32]))), "not a u32"),
    "alignment past the file": (Raw(pairs=aligned(pair("general.alignment", "u32", 2**31))), "ends|outside"),
    "smaller alignment than the offsets": (Raw(pairs=aligned(pair("general.alignment", "u32", 1))), "one before it"),
    "larger alignment than the offsets": (Raw(pairs=aligned(pair("general.alignment", "u32", 64))), "one before|outs"),
    "long name": (Raw(tensors=replaced(1, tensor("n" * 64, [5], 0, 864))), "too long"),
    "empty name": (Raw(tensors=replaced(1, tensor("", [5], 0, 864))), "empty"),
    "name is not UTF-8": (Raw(tensors=replaced(1, tensor(b"\xfe", [5], 0, 864))), "not UTF-8"),
    "repeated name": (Raw(tensors=replaced(1, tensor("blk.0.w.weight", [5], 0, 864))), "two tensors have one name"),
    "five axes": (Raw(tensors=replaced(1, tensor("norm.weight", [5, 1, 1, 1, 1], 0, 864))), "too many axes"),
    "2³² axes": (Raw(tensors=replaced(1, tensor("norm.weight", [5], 0, 864, axes=2**32 - 1))), "too many axes"),
    "negative size": (Raw(tensors=replaced(1, tensor("norm.weight", [2**64 - 5], 0, 864))), "overflows"),
    "product overflows": (Raw(tensors=replaced(1, tensor("norm.weight", [2**32, 2**32], 0, 864))), "overflows"),
    "product wraps to 5": (Raw(tensors=replaced(1, tensor("norm.weight", [5, 2**62, 4, 1], 0, 864))), "overflows"),
    "a zero hides an overflow": (Raw(tensors=replaced(1, tensor("n", [2**62, 2**62, 0], 0, 864))), "overflows"),
    "bytes overflow": (Raw(tensors=replaced(1, tensor("norm.weight", [2**61], 0, 864))), "overflows"),
    "bytes wrap in padding": (Raw(tensors=replaced(1, tensor("n", [4, 2**30 - 1, 2**30 + 1], 0, 864))), "overflows"),
    "larger than the file": (Raw(tensors=replaced(2, tensor("blk.1.w.weight", [64, 5], 8, 896))), "outside the file"),
    "not whole blocks": (Raw(tensors=replaced(0, tensor("blk.0.w.weight", [255, 3, 2], 12, 0))), "blocks of Q4_K"),
    "removed type": (Raw(tensors=replaced(1, tensor("norm.weight", [5], 4, 864))), "unknown type of tensor"),
    "unknown type": (Raw(tensors=replaced(1, tensor("norm.weight", [5], 99, 864))), "unknown type of tensor"),
    "negative type": (Raw(tensors=replaced(1, tensor("norm.weight", [5], 2**32 - 1, 864))), "unknown type of tensor"),
    "offset not aligned": (Raw(tensors=replaced(1, tensor("norm.weight", [5], 0, 865))), "one before it ends"),
    "offsets overlap": (Raw(tensors=replaced(1, tensor("norm.weight", [5], 0, 832))), "one before it ends"),
    "a hole": (Raw(tensors=replaced(2, tensor("blk.1.w.weight", [64, 4], 8, 928))), "one before it ends"),
    "offset is enormous": (Raw(tensors=replaced(2, tensor("blk.1.w.weight", [64, 4], 8, 2**64 - 32))), "one before"),
    "two huge tensors": (
        Raw(tensors=(tensor("a", [2**63 - 64], 24, 0), tensor("b", [2**63 - 64], 24, 2**63 - 64))),
        "outside the file",
    ),
    "payload cut off": (Raw(payload=bytes(PAYLOAD_BYTES - 17)), "outside the file"),
    "no payload": (Raw(payload=b""), "outside the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_refuses_a_lying_header(tmp_path: Path, name: str) -> None:
    raw, message = LIES[name]
    assert re.search(message, refuse(tmp_path, raw.build()))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw = Raw().build()
    for length in range(len(raw) - PAYLOAD_BYTES + 900):
        refuse(tmp_path, raw[:length])


@pytest.mark.parametrize(
    "raw",
    [
        Raw(pairs=(), tensors=(), payload=b""),
        Raw(pairs=(pair("general.alignment", "u32", 1),), tensors=(tensor("a", [3], 24, 0),), alignment=1),
        Raw(tensors=(tensor("empty", [4, 0], 0, 0), tensor("one", [], 0, 0))),
        Raw(version=2),
    ],
)
def test_odd_but_right_files_are_read(tmp_path: Path, raw: Raw) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.build())
    assert len(read_gguf(path).tensors) == len(raw.tensors)


def test_a_pipe_and_an_absent_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no such GGUF file"):
        read_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    "claim",
    [
        *(pair("k", 9, struct.pack("<IQ", kind, 90_000_000)) for kind in (0, 7, 8, 12)),
        pair("k", 8, struct.pack("<Q", 200_000_000)),
        struct.pack("<Q", 200_000_000),
    ],
    ids=["bytes", "truths", "strings", "doubles", "string", "key"],
)
def test_memory_follows_the_file_and_not_its_claims(tmp_path: Path, claim: bytes) -> None:
    claims = Raw(pairs=(*PAIRS, claim))
    path = tmp_path / "m.gguf"
    path.write_bytes(claims.build())
    os.truncate(path, 1 << 30)  # sparse: the claim fits the file, and is still no vocabulary
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- split files


def part(number: int, count: int, tensors: tuple[bytes, ...], total: int, **more: bytes) -> bytes:
    pairs = (
        *(PAIRS if number == 0 else ()),
        pair("split.no", "u16", number),
        pair("split.count", "u16", count),
        pair("split.tensors.count", "i32", total),
        *more.values(),
    )
    return Raw(pairs=pairs, tensors=tensors, payload=bytes([number + 1]) * 64).build()


def write_parts(folder: Path, *parts: bytes, count: int = 2) -> list[Path]:
    paths = [folder / f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(len(parts))]
    for path, raw in zip(paths, parts, strict=True):
        path.write_bytes(raw)
    return paths


A, B = tensor("a", [4], 0, 0), tensor("b", [8], 0, 0)


def test_parts_are_joined_from_any_of_them(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, part(0, 2, (A,), 2), part(1, 2, (B,), 2))
    for path in paths:
        found = open_gguf(path)
        assert list(found.tensors) == ["a", "b"]
        assert found.read("b").tobytes() == bytes([2]) * 32
        assert "split.no" not in found.metadata
        assert found.value("general.architecture") == "gemma4"
        assert found.parts == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "missing"),
        (part(0, 2, (B,), 2), "says that it is another"),
        (part(1, 3, (B,), 2), "says that it is another"),
        (part(1, 2, (A,), 2), "two parts hold one tensor"),
        (part(1, 2, (), 2), "do not hold all tensors"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, second: bytes | None, message: str) -> None:
    first = part(0, 2, (A,), 2)
    paths = write_parts(tmp_path, *([first] if second is None else [first, second]))
    with pytest.raises(CheckpointError, match=message):
        open_gguf(paths[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "renamed.gguf"
    path.write_bytes(part(0, 2, (A,), 2))
    with pytest.raises(CheckpointError, match="keep its name"):
        open_gguf(path)
