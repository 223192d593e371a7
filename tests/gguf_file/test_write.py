"""What is laid out is what stands in the file; a broken-off run leaves nothing that a reader takes for a model."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.families.gguf import ScalarKind, Value
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import gguf_writer, lay_out, lay_out_split, open_gguf, read_gguf
from gemcut.gguf_file.write import Entry

METADATA = {
    "general.architecture": Value("str", "gemma4"),
    "gemma4.block_count": Value("u32", 3),
    "gemma4.eps": Value("f32", 1e-6),
    "gemma4.pattern": Value("bool", (True, False, True)),
    "gemma4.kv": Value("i32", (4, 4, 2)),
    "tokenizer.ggml.tokens": Value("str", ("<bos>", "ü", "")),
    "x.flag": Value("bool", True),
    "x.wide": Value("u64", 2**64 - 1),
}
ENTRIES: list[Entry] = [
    ("blk.0.w.weight", GgmlType.Q4_K, (2, 3, 256)),
    ("norm.weight", GgmlType.F32, (5,)),
    ("blk.1.w.weight", GgmlType.Q8_0, (4, 64)),
]


def payload(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def write_all(
    path: Path, metadata: dict[str, Value], entries: list[Entry], alignment: int | None = None
) -> list[bytes]:
    layout = lay_out(metadata, entries, alignment, name=path.name)
    sent = [payload(ref.size_bytes, i) for i, ref in enumerate(layout.tensors.values())]
    with gguf_writer(path, layout) as writer:
        for ref, raw in reversed(list(zip(layout.tensors.values(), sent, strict=True))):
            half = len(raw) // 2
            writer.write(ref.name, half, memoryview(raw)[half:])
            writer.write(ref.name, 0, memoryview(raw)[:half])
    assert path.stat().st_size == layout.size_bytes
    return sent


def test_bytes_equal_those_of_the_format_s_own_writer(tmp_path: Path) -> None:
    sent = write_all(tmp_path / "ours.gguf", METADATA, ENTRIES)
    theirs = GGUFWriter(tmp_path / "theirs.gguf", "gemma4")
    theirs.add_uint32("gemma4.block_count", 3)
    theirs.add_float32("gemma4.eps", 1e-6)
    theirs.add_array("gemma4.pattern", [True, False, True])
    theirs.add_array("gemma4.kv", [4, 4, 2])
    theirs.add_array("tokenizer.ggml.tokens", ["<bos>", "ü", ""])
    theirs.add_bool("x.flag", True)
    theirs.add_uint64("x.wide", 2**64 - 1)
    for (name, kind, shape), raw in zip(ENTRIES, sent, strict=True):
        data = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
        if kind is GgmlType.F32:
            theirs.add_tensor(name, np.frombuffer(raw, np.float32))
        else:
            theirs.add_tensor(name, data, raw_dtype=GGMLQuantizationType(int(kind)))
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [None, 1, 64, 4096])
def test_reads_back_here_and_there(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "m.gguf"
    sent = write_all(path, METADATA, ENTRIES, alignment)
    ours, theirs = read_gguf(path), GGUFReader(path)
    for i, (name, kind, shape) in enumerate(ENTRIES):
        assert (ours.tensors[name].kind, ours.tensors[name].shape) == (kind, shape)
        assert ours.tensors[name].start % (alignment or 32) == 0
        assert ours.read(name).tobytes() == sent[i]
        assert theirs.tensors[i].data.tobytes() == sent[i]
        assert tuple(theirs.tensors[i].shape[::-1]) == shape
    assert {key: ours.metadata[key] for key in METADATA if key != "gemma4.eps"} == {
        key: value for key, value in METADATA.items() if key != "gemma4.eps"
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Value("u8", 256), "does not fit"),
        (Value("u32", -1), "does not fit"),
        (Value("i32", (1, 2**31)), "does not fit"),
        (Value("u32", "1"), "does not fit"),
        (Value("str", (1, 2)), "does not fit"),
        (Value("f32", 1e39), "does not fit"),
    ],
)
def test_a_value_that_its_type_cannot_hold(value: Value, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lay_out({"k": value}, [])


@pytest.mark.parametrize(
    "entries",
    [
        [("a", GgmlType.F32, (1,)), ("a", GgmlType.F32, (1,))],
        [("n" * 64, GgmlType.F32, (1,))],
        [("", GgmlType.F32, (1,))],
        [("a", GgmlType.Q4_K, (704,))],
        [("a", GgmlType.F32, (1, 1, 1, 1, 1))],
    ],
)
def test_a_tensor_that_no_reader_takes(entries: list[Entry]) -> None:
    with pytest.raises(UsageError):
        lay_out({}, entries)


def write_sizes(path: Path, sizes: dict[str, int]) -> None:
    with gguf_writer(path, lay_out(METADATA, ENTRIES, name=path.name)) as writer:
        for name, size in sizes.items():
            writer.write(name, 0, memoryview(bytes(size)))


def test_a_missing_byte_is_noticed_and_nothing_appears(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="not every byte"):
        write_sizes(path, {"norm.weight": 20, "blk.0.w.weight": 864, "blk.1.w.weight": 271})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="outside the tensor"):
        write_sizes(path, {"norm.weight": 21})


def test_an_older_file_survives_a_run_that_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_all(path, METADATA, ENTRIES)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), gguf_writer(path, lay_out(METADATA, ENTRIES[:1], name="m.gguf")):
        raise RuntimeError
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from gemcut.gguf_file import gguf_writer, lay_out
from gemcut.ggml.types import GgmlType
layout = lay_out({}, [("a", GgmlType.F32, (1000,)), ("b", GgmlType.F32, (1000,))], name="m.gguf")
with gguf_writer(Path(sys.argv[1]), layout, keep_partial=True) as writer:
    writer.write("a", 0, memoryview(b"x" * 4000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_no_magic_and_its_payload_can_be_taken_up(tmp_path: Path) -> None:
    path, partial = tmp_path / "m.gguf", tmp_path / "m.gguf.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    with pytest.raises(CheckpointError, match="never finished"):
        read_gguf(partial)
    layout = lay_out({}, [("a", GgmlType.F32, (1000,)), ("b", GgmlType.F32, (1000,))], name="m.gguf")
    with gguf_writer(path, layout, keep_partial=True) as writer:
        view = memoryview(bytearray(4000))
        assert writer.read_into("a", 0, view)
        assert bytes(view) == b"x" * 4000
        writer.mark("a", 4000)
        writer.write("b", 0, memoryview(b"y" * 4000))
    assert read_gguf(path).read("a").tobytes() == b"x" * 4000
    assert not partial.exists()


def test_what_an_earlier_run_left_in_the_padding_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    (tmp_path / "m.gguf.partial").write_bytes(b"\xff" * 5000)
    layout = lay_out({}, [("a", GgmlType.F32, (5,)), ("b", GgmlType.F32, (3,))], name="m.gguf")
    with gguf_writer(path, layout, keep_partial=True) as writer:
        writer.write("a", 0, memoryview(bytes(20)))
        writer.write("b", 0, memoryview(bytes(12)))
    assert b"\xff" not in path.read_bytes()


def test_a_full_disk_is_said_before_the_first_byte(tmp_path: Path) -> None:
    layout = lay_out({}, [("a", GgmlType.F32, (1 << 20,))], name="m.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(MissingError, match="disk is full"), gguf_writer(tmp_path / "m.gguf", layout):
            pytest.fail("the block ran")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- split files


def write_parts(folder: Path, entries: list[Entry], limit: int) -> tuple[str, ...]:
    layouts = lay_out_split(METADATA, entries, limit, name="m.gguf")
    for layout in layouts:
        with gguf_writer(folder / layout.name, layout) as writer:
            for ref in layout.tensors.values():
                writer.write(ref.name, 0, memoryview(payload(ref.size_bytes, len(ref.name))))
    return tuple(layout.name for layout in layouts)


def test_parts_keep_to_the_limit_and_join_again(tmp_path: Path) -> None:
    entries: list[Entry] = [(f"t{'x' * i}", GgmlType.F32, (250,)) for i in range(7)]  # 1000 bytes, 1024 padded
    names = write_parts(tmp_path, entries, 3 * 1024)
    assert names == tuple(f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3))
    found = open_gguf(tmp_path / names[1])
    assert list(found.tensors) == [entry[0] for entry in entries]
    assert [found.tensors[e[0]].part for e in entries] == [names[0]] * 3 + [names[1]] * 3 + [names[2]]
    for name, _, _ in entries:
        assert found.read(name).tobytes() == payload(1000, len(name))
    assert [int(GGUFReader(tmp_path / n).fields["split.no"].contents()) for n in names] == [0, 1, 2]


def test_a_tensor_above_the_limit_has_its_own_part_and_one_part_is_no_split(tmp_path: Path) -> None:
    entries: list[Entry] = [("a", GgmlType.F32, (8,)), ("b", GgmlType.F32, (800,)), ("c", GgmlType.F32, (8,))]
    assert len(write_parts(tmp_path, entries, 100)) == 3
    assert lay_out_split(METADATA, entries, 10_000, name="m.gguf")[0].name == "m.gguf"
    assert "split.no" not in lay_out_split(METADATA, entries, None, name="m.gguf")[0].metadata


# ---------------------------------------------------------------- properties

kinds: dict[ScalarKind, st.SearchStrategy[object]] = {
    "u8": st.integers(0, 255), "i8": st.integers(-128, 127), "u16": st.integers(0, 2**16 - 1),
    "i32": st.integers(-(2**31), 2**31 - 1), "u64": st.integers(0, 2**64 - 1), "bool": st.booleans(),
    "f64": st.floats(allow_nan=False), "str": st.text(max_size=5),
}  # fmt: skip
values = st.sampled_from(sorted(kinds)).flatmap(
    lambda kind: st.one_of(kinds[kind], st.lists(kinds[kind], max_size=4).map(tuple)).map(lambda v: Value(kind, v))
)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
tensors = st.dictionaries(names, st.tuples(st.sampled_from([GgmlType.F32, GgmlType.I8, GgmlType.F16]),
                                           st.lists(st.integers(0, 4), max_size=4).map(tuple)), max_size=4)  # fmt: skip


@given(st.dictionaries(names, values, max_size=4), tensors, st.sampled_from([None, 1, 8, 128]))
def test_whatever_is_laid_out_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, Value],
    entries: dict[str, tuple[GgmlType, tuple[int, ...]]],
    alignment: int | None,
) -> None:
    path = tmp_path_factory.mktemp("w") / "m.gguf"
    sent = write_all(path, metadata, [(n, k, s) for n, (k, s) in entries.items()], alignment)
    found = read_gguf(path)
    assert {key: value for key, value in found.metadata.items() if key != "general.alignment"} == metadata
    assert [found.read(name).tobytes() for name in entries] == sent
    os.unlink(path)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingError, match="cannot write"), gguf_writer(tmp_path / "file" / "m.gguf", lay_out({}, [])):
        pass


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(CheckpointError, match="no Unicode") as caught:
        lay_out({"tokenizer.ggml.tokens": Value("str", ("good", "\ud83d"))}, [])
    assert "tokenizer.ggml.tokens" in str(caught.value)
    assert str(caught.value).isascii()
