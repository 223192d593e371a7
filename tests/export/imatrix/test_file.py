from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.export.imatrix.small import DENSE, EXPERTS, small, small_layout

from gemcut.errors import CheckpointError, UsageError
from gemcut.export.imatrix import Entry, Imatrix, Inputs, fit, read_imatrix, write_imatrix


def assert_same(a: Imatrix, b: Imatrix) -> None:
    assert a.entries.keys() == b.entries.keys()
    for name, entry in a.entries.items():
        np.testing.assert_array_equal(entry.sums, b.entries[name].sums)
        np.testing.assert_array_equal(entry.counts, b.entries[name].counts)
    for field in ("datasets", "chunks", "chunk_size", "variant", "prior_tokens", "starved", "model_fingerprint"):
        assert getattr(a, field) == getattr(b, field), field


names = st.text("abcdefghij.0123456789_", min_size=1, max_size=40)


@st.composite
def matrices(draw: st.DrawFn) -> Imatrix:
    entries = {}
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        units, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
        rng = np.random.default_rng(draw(st.integers(0, 1000)))
        counts = np.array(draw(st.lists(st.integers(0, 2**24), min_size=units, max_size=units)), np.int64)
        sums = (rng.random((units, columns)) * 10 ** rng.uniform(-30, 30)).astype(np.float32)
        entries[name + ".weight"] = Entry(sums, counts)
    texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="/\\"), min_size=1, max_size=20)
    return Imatrix(
        entries=entries,
        datasets=tuple(draw(st.lists(texts, min_size=1, max_size=3))),
        chunks=draw(st.integers(0, 2**32 - 1)),
        chunk_size=draw(st.integers(0, 2**32 - 1)),
        variant=draw(st.sampled_from(["plain", "hybrid", "rms4", "max", "auto"])),
        model_fingerprint=draw(st.sampled_from(["", "f" * 64])),
    )


@given(matrices())
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, imatrix: Imatrix) -> None:
    path = tmp_path_factory.mktemp("r") / "i.gguf"
    write_imatrix(path, imatrix)
    assert_same(imatrix, read_imatrix(path))


def test_starved_experts_survive_the_file(tmp_path: Path) -> None:
    imatrix = replace(small(counts=(100, 64, 100, 66)), prior_tokens=64, starved={EXPERTS: (1, 3)})
    write_imatrix(tmp_path / "i.gguf", imatrix)
    found = read_imatrix(tmp_path / "i.gguf")
    assert_same(imatrix, found)
    assert found.tokens(EXPERTS).tolist() == [100, 0, 100, 2]


def test_what_blocks_are_picked_by_survives_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = {EXPERTS: Inputs(rng.standard_normal((4, 8)).astype(np.float32), rng.random((4, 8), np.float32))}
    write_imatrix(tmp_path / "i.gguf", replace(small(), roundings=8, inputs=inputs))
    found = read_imatrix(tmp_path / "i.gguf")
    assert found.roundings == 8
    assert found.inputs.keys() == {EXPERTS}
    np.testing.assert_array_equal(found.inputs[EXPERTS].mean, inputs[EXPERTS].mean)
    np.testing.assert_array_equal(found.inputs[EXPERTS].spread, inputs[EXPERTS].spread)
    given = found.blocks(EXPERTS, 2)
    assert given is not None
    assert len(given.importances) == 8
    assert found.blocks(DENSE) is None  # no inputs: quantised once
    assert replace(found, roundings=1).blocks(EXPERTS) is None
    assert fit(found, small_layout()).inputs.keys() == {EXPERTS}


def test_the_gguf_package_reads_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    imatrix = small()
    write_imatrix(tmp_path / "i.gguf", imatrix)
    found = gguf.GGUFReader(str(tmp_path / "i.gguf"))
    assert found.fields["general.type"].contents() == "imatrix"
    assert found.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert found.fields["imatrix.chunk_count"].contents() == 2
    assert found.fields["imatrix.chunk_size"].contents() == 512
    tensors = {one.name: one for one in found.tensors}
    assert list(tensors) == [f"{n}.{k}" for n in (DENSE, EXPERTS) for k in ("in_sum2", "counts")]
    assert tensors[f"{EXPERTS}.in_sum2"].shape.tolist() == [8, 4]
    assert tensors[f"{EXPERTS}.counts"].shape.tolist() == [1, 4]
    np.testing.assert_array_equal(tensors[f"{EXPERTS}.in_sum2"].data, imatrix.entries[EXPERTS].sums)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", small())
    before = (tmp_path / "i.gguf").read_bytes()
    with pytest.raises(UsageError):
        write_imatrix(tmp_path / "i.gguf", small(1))
    assert (tmp_path / "i.gguf").read_bytes() == before
    write_imatrix(tmp_path / "i.gguf", small(1), force=True)
    assert (tmp_path / "i.gguf").read_bytes() != before


def foreign(path: Path, tensors: dict[str, np.ndarray], **fields: object) -> Path:
    """A file as another program would write it."""
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type(str(fields.get("type", "imatrix")))
    if "datasets" not in fields.get("without", ()):  # type: ignore[operator]
        writer.add_array("imatrix.datasets", ["/home/somebody/wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for key, value in fields.get("own", {}).items():  # type: ignore[attr-defined]
        writer.add_array(key, value) if isinstance(value, list) else writer.add_uint32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(sums: object, counts: object, name: str = DENSE) -> dict[str, np.ndarray]:
    return {f"{name}.in_sum2": np.asarray(sums, np.float32), f"{name}.counts": np.asarray(counts, np.float32)}


def test_a_file_of_another_writer(tmp_path: Path) -> None:
    path = foreign(tmp_path / "i.gguf", pair([[4.0, 8.0]], [[2.4]]))
    found = read_imatrix(path)
    assert found.datasets == ("wiki.txt",)  # no path of somebody's machine
    assert found.entries[DENSE].counts.tolist() == [2]
    assert found.variant == "plain"


@pytest.mark.parametrize(
    ("tensors", "fields", "said"),
    [
        (pair([[1.0, np.nan]], [[2.0]]), {}, "NaN"),
        (pair([[1.0, np.inf]], [[2.0]]), {}, "NaN"),
        (pair([[1.0, -3.0]], [[2.0]]), {}, "negative"),
        (pair([[1.0, 3.0]], [[-2.0]]), {}, "count is impossible"),
        (pair([[1.0, 3.0]], [[np.nan]]), {}, "count is impossible"),
        (pair([[1.0, 3.0]], [[1e30]]), {}, "count is impossible"),
        (pair([[1.0, 3.0, 4.0]], [[1.0], [2.0]]), {}, "do not belong together"),
        ({f"{DENSE}.in_sum2": np.ones((1, 2), np.float32)}, {}, "sums without counts"),
        ({f"{DENSE}.counts": np.ones((1, 1), np.float32)}, {}, "sums without counts"),
        ({"weight": np.ones((1, 2), np.float32)}, {}, "no entries"),
        (
            {f"{DENSE}.in_sum2": np.ones((1, 2), np.float16), f"{DENSE}.counts": np.ones((1, 1), np.float32)}, {},
            "must be F32",
        ),
        (pair([[1.0, 3.0]], [[2.0]]), {"type": "model"}, "no imatrix"),
        (pair([[1.0, 3.0]], [[2.0]]), {"without": ("datasets",)}, "no metadata"),
        (pair([[1.0, 3.0]], [[2.0]]), {"own": {"gemcut.imatrix.starved": [f"{DENSE}:7"]}}, "starved"),
        (pair([[1.0, 3.0]], [[2.0]]), {"own": {"gemcut.imatrix.starved": ["x"]}}, "starved"),
        (pair([[1.0, 3.0]], [[2.0]]), {"own": {"gemcut.imatrix.roundings": 100_000}}, "too many roundings"),
        (pair([[1.0, 3.0]], [[2.0]]) | {f"{DENSE}.mean": np.ones((1, 2), np.float32)}, {}, "means without spreads"),
        (
            pair([[1.0, 3.0]], [[2.0]])
            | {f"{DENSE}.mean": np.ones((1, 2), np.float32), f"{DENSE}.spread": -np.ones((1, 2), np.float32)},
            {},
            "impossible",
        ),
        (
            pair([[1.0, 3.0]], [[2.0]]),
            {"own": {"gemcut.imatrix.starved": [f"{DENSE}:0"], "gemcut.imatrix.prior_tokens": 9}}, "less than nothing",
        ),
    ],
)  # fmt: skip
def test_hostile_files_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], fields: dict[str, object], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_imatrix(foreign(tmp_path / "i.gguf", tensors, **fields))


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", small())
    whole = (tmp_path / "i.gguf").read_bytes()
    for size in (0, 3, 10, 200, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_imatrix(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(bytes(len(whole)))
    with pytest.raises(CheckpointError, match="not a GGUF"):
        read_imatrix(tmp_path / "cut.gguf")


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_imatrix(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError) as caught:
        read_imatrix(Path("."))
    assert caught.value.where == "."


# ---------------------------------------------------------------- the older form


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += np.asarray(values, "<f4").tobytes()
    return out + tail


def test_the_older_form_gives_the_same_importances(tmp_path: Path) -> None:
    imatrix = small(counts=(100, 1, 50, 0))
    calls = 3
    values = {}
    for name, entry in imatrix.entries.items():
        rows = [imatrix.importance(name, unit) for unit in range(len(entry.counts))]
        values[name] = (calls, (np.concatenate([r for r in rows if r is not None]) * calls).tolist())
    tail = struct.pack("<ii", 3, 12) + b"/a/b/wiki.md"
    (tmp_path / "i.dat").write_bytes(legacy(values, tail))
    found = fit(read_imatrix(tmp_path / "i.dat"), small_layout())
    assert (found.chunks, found.datasets) == (3, ("wiki.md",))
    for name, entry in imatrix.entries.items():
        for unit in range(len(entry.counts)):
            np.testing.assert_allclose(found.importance(name, unit), imatrix.importance(name, unit), rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:9],
        lambda raw: b"",
        lambda raw: struct.pack("<i", -1) + raw[4:],
        lambda raw: struct.pack("<i", 2**31 - 1) + raw[4:],
        lambda raw: raw[:4] + struct.pack("<i", 2**30) + raw[8:],
        lambda raw: raw[:-8] + struct.pack("<ff", float("nan"), 1.0),
        lambda raw: struct.pack("<i", 2) + raw[4:] * 2,
    ],
)
def test_hostile_files_of_the_older_form(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    (tmp_path / "i.dat").write_bytes(change(legacy({DENSE: (3, [1.0, 2.0, 3.0])})))
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "i.dat")


@pytest.mark.parametrize("head", [(7, 2**30), (2**31 - 1, 4), (1, 4)])
def test_a_large_file_that_is_no_imatrix_is_not_read(tmp_path: Path, head: tuple[int, int]) -> None:
    with open(tmp_path / "i.dat", "wb") as f:
        f.write(struct.pack("<ii", *head))
        f.truncate(1 << 32)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="too large" if head == (1, 4) else "no imatrix"):
        read_imatrix(tmp_path / "i.dat")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("b") / "i.dat"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        assert read_imatrix(path).entries
