"""A header is believed in nothing: every lie is a CheckpointError, and never another exception."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from gemcut.checkpoint.header import MAX_HEADER_BYTES, lay_out, parse_header, read_header
from gemcut.errors import CheckpointError
from gemcut.types import DTYPE_BYTES

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]},
    "c": {"dtype": "U8", "shape": [0, 7], "data_offsets": [28, 28]},
}


def pack(header: object, data: bytes = bytes(28)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def changed(tensor: str = "a", **fields: Any) -> dict[str, Any]:
    return {**GOOD, tensor: {**GOOD[tensor], **fields}}


def refuse(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path, "model.safetensors")
    return str(caught.value)


def test_reads_what_the_reference_writer_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones((0, 4), np.float16), "z": np.ones(())}
    save_file(tensors, path, metadata={"format": "pt", "ü": "é"})
    header = read_header(path, path.name)
    assert {ref.name: ref.shape for ref in header.tensors} == {"x": (2, 3), "y": (0, 4), "z": ()}
    assert header.metadata == {"format": "pt", "ü": "é"}
    raw = path.read_bytes()
    for ref in header.tensors:
        assert raw[ref.start : ref.stop] == tensors[ref.name].tobytes()


def test_lay_out_is_read_by_the_reference_reader(tmp_path: Path) -> None:
    first = parse_header(json.dumps(GOOD).encode(), "s", 8 + len(json.dumps(GOOD)) + 28)
    laid = lay_out("s", first.tensors, first.metadata)
    assert len(laid.raw) % 8 == 0
    path = tmp_path / "s.safetensors"
    path.write_bytes(pack(laid.raw, bytes(range(28))))
    with safe_open(path, "np") as f:
        assert sorted(f.keys()) == ["a", "b", "c"]
        assert f.get_tensor("b").tobytes() == bytes(range(12, 28))
        assert f.metadata() == {"format": "pt"}
    assert read_header(path, "s") == laid


LIES = {
    "unknown dtype": (changed(dtype="F7"), "unknown dtype"),
    "dtype is a number": (changed(dtype=3), "unknown dtype"),
    "negative dimension": (changed(shape=[-2, -3]), "something else than sizes"),
    "dimension is a bool": (changed(shape=[True, 6]), "something else than sizes"),
    "dimension is a float": (changed(shape=[2.0, 3]), "something else than sizes"),
    "shape is a string": (changed(shape="23"), "not a list"),
    "product overflows": (changed(shape=[2**40, 2**40]), "overflows"),
    "product wraps to the span": (changed(shape=[2**32, 2**31, 2, 3]), "overflows"),
    "dimension beyond 64 bits": (changed(shape=[2**64 + 6]), "something else than sizes"),
    "span too small": (changed(data_offsets=[0, 11]), "disagree"),
    "shape too large": (changed(shape=[2, 4]), "disagree"),
    "offsets swapped": (changed(data_offsets=[12, 0]), "outside the file"),
    "negative offset": (changed(data_offsets=[-12, 0]), "outside the file"),
    "offset past the end": (changed("b", data_offsets=[20, 36]), "outside the file"),
    "offset is enormous": (changed("b", data_offsets=[2**63, 2**63 + 16]), "outside the file"),
    "offset is a string": (changed(data_offsets=["0", "12"]), "not a pair of integers"),
    "offset is a bool": (changed(data_offsets=[False, 12]), "not a pair of integers"),
    "three offsets": (changed(data_offsets=[0, 12, 12]), "not a pair"),
    "overlap": (changed("b", data_offsets=[8, 24]), "overlap"),
    "hole": ({"a": GOOD["a"], "b": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]}}, "hole"),
    "trailing bytes": ({"a": GOOD["a"]}, "bytes follow the last tensor"),
    "no tensors but bytes": ({}, "bytes follow the last tensor"),
    "entry is a list": ({**GOOD, "a": [1]}, "malformed"),
    "entry without shape": ({**GOOD, "a": {"dtype": "BF16", "data_offsets": [0, 12]}}, "malformed"),
    "entry with more": (changed(extra=1), "malformed"),
    "metadata is a list": ({**GOOD, "__metadata__": []}, "map of strings"),
    "metadata holds a number": ({**GOOD, "__metadata__": {"a": 1}}, "map of strings"),
    "not an object": (b"[1]", "does not begin with {"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "not valid JSON"),
    "not JSON": (b'{"a": ', "not valid JSON"),
    "NaN": (b'{"a": NaN}', "not a finite number"),
    "infinite float": (b'{"a": 1e999}', "not a finite number"),
    "deep nesting": (b'{"a":' * 100_000, "not valid JSON"),
    "lone surrogate": (b'{"\\ud800": {"dtype": "U8", "shape": [28], "data_offsets": [0, 28]}}', "not valid JSON"),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("name", LIES)
def test_refuses_a_lying_header(tmp_path: Path, name: str) -> None:
    header, message = LIES[name]
    assert message in refuse(tmp_path, pack(header))


def test_refuses_a_repeated_key(tmp_path: Path) -> None:
    entry = b'"a": {"dtype": "U8", "shape": [28], "data_offsets": [0, 28]}'
    assert "repeated" in refuse(tmp_path, pack(b"{" + entry + b", " + entry + b"}"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        (struct.pack("<Q", 0), "does not begin"),
        (struct.pack("<Q", 100) + b"{}", "longer than the file"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "too large"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "too large"),
        (pack(GOOD)[:-1], "outside the file"),
        (pack(GOOD) + b"\0", "bytes follow"),
    ],
)
def test_refuses_a_file_of_the_wrong_length(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refuse(tmp_path, content)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe", "pipe")


def test_the_message_names_tensor_and_shard(tmp_path: Path) -> None:
    assert "at     a in model.safetensors" in refuse(tmp_path, pack(changed(dtype="F7")))


# ---------------------------------------------------------------- properties

numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]), st.booleans(),
    st.floats(), st.none(), st.text(max_size=3),
)  # fmt: skip
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(sorted(DTYPE_BYTES)), numbers),
        "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
        "more": numbers,
    },
)
headers = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)), st.one_of(entries, numbers), max_size=4
)


def only_checkpoint_errors(raw: bytes, file_bytes: int) -> None:
    try:
        header = parse_header(raw, "s", file_bytes)
    except CheckpointError as error:
        str(error).encode()  # a message that can be printed
        return
    at = header.data_start  # accepted: then the tensors tile the file exactly
    for ref in header.tensors:
        assert ref.start == at
        assert ref.size_bytes == ref.elements * DTYPE_BYTES[ref.dtype]
        at = ref.stop
    assert at == file_bytes


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(headers, st.integers(0, 64))
def test_any_object_as_header(header: dict[str, Any], data: int) -> None:
    raw = json.dumps(header).encode()
    only_checkpoint_errors(raw, 8 + len(raw) + data)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6), st.integers(-3, 3))
def test_any_mutation_of_a_good_header(flips: list[tuple[int, int]], longer: int) -> None:
    raw = bytearray(json.dumps(GOOD).encode())
    for at, value in flips:
        raw[at % len(raw)] = value
    only_checkpoint_errors(bytes(raw), 8 + len(raw) + 28 + longer)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_as_header(raw: bytes) -> None:
    only_checkpoint_errors(b"{" + raw, 9 + len(raw))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=3)), max_size=5))
def test_what_is_laid_out_reads_back(tensors: list[tuple[str, list[int]]]) -> None:
    entries: dict[str, Any] = {}
    at = 0
    for k, (dtype, shape) in enumerate(tensors):
        size = DTYPE_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
        entries[f"t{k}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(entries).encode()
    header = parse_header(raw, "s", 8 + len(raw) + at)
    laid = lay_out("s", header.tensors, {"k": "v"})
    again = parse_header(laid.raw, "s", laid.size_bytes)
    assert again.tensors == laid.tensors
    assert [ref.name for ref in sorted(header.tensors, key=lambda r: (r.start, r.stop))] == [
        r.name for r in again.tensors
    ]
