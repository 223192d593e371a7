"""What turned one GGUF file into another, found in its bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemcut.errors import UsageError
from gemcut.families.gguf import Value
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.gguf_file import GgufFile, gguf_writer, lay_out, lay_out_split, open_gguf
from gemcut.gguf_file.compare import diff_gguf, take_of_blocks
from gemcut.types import Take, TensorFact

Payload = tuple[GgmlType, tuple[int, ...], bytes]
METADATA = {"general.architecture": Value("str", "none")}
KINDS = {
    "experts": (GgmlType.Q4_K, (6, 4, 512)),
    "columns": (GgmlType.Q6_K, (8, 1024)),
    "plain": (GgmlType.F32, (5, 3)),
    "typed": (GgmlType.Q8_0, (4, 64)),
    "gone": (GgmlType.F16, (7,)),
}


def payloads(seed: int = 0) -> dict[str, Payload]:
    rng = np.random.default_rng(seed)
    return {name: (kind, shape, rng.bytes(tensor_bytes(kind, shape))) for name, (kind, shape) in KINDS.items()}


def written(path: Path, tensors: dict[str, Payload], metadata: dict[str, Value] = METADATA) -> GgufFile:
    layout = lay_out(metadata, [(name, kind, shape) for name, (kind, shape, _) in tensors.items()], name=path.name)
    with gguf_writer(path, layout) as writer:
        for name, (_, _, raw) in tensors.items():
            writer.write(name, 0, memoryview(raw))
    return open_gguf(path)


def by_name(before: GgufFile, after: GgufFile) -> dict[str, TensorFact]:
    return {fact.name: fact for fact in diff_gguf(before, after).tensors}


def test_what_is_found_without_a_hint(tmp_path: Path) -> None:
    before = payloads()
    after = dict(before)
    experts = np.frombuffer(before["experts"][2], np.uint8).reshape(6, -1)[[0, 2, 5]]
    after["experts"] = (GgmlType.Q4_K, (3, 4, 512), experts.tobytes())
    blocks = np.frombuffer(before["columns"][2], np.uint8).reshape(8, 4, -1)[:, [1, 2]]
    after["columns"] = (GgmlType.Q6_K, (8, 512), blocks.tobytes())
    after["typed"] = (GgmlType.Q4_0, (4, 64), bytes(tensor_bytes(GgmlType.Q4_0, (4, 64))))
    after["plain"] = (GgmlType.F32, (5, 3), np.arange(15, dtype=np.float32).tobytes())
    after["new"] = after.pop("gone")
    a = written(tmp_path / "a.gguf", before)
    b = written(tmp_path / "b.gguf", after, {**METADATA, "x": Value("f32", float("nan"))})
    found = by_name(a, b)
    assert (found["experts"].found, found["experts"].axis, found["experts"].index) == ("take", 0, (0, 2, 5))
    assert (found["experts"].dtype, found["experts"].shape_before) == ("Q4_K", (6, 4, 512))
    assert (found["columns"].found, found["columns"].axis) == ("take", 1)
    assert found["columns"].index == tuple(range(256, 768))
    assert (found["typed"].found, found["typed"].dtype) == ("values", "Q8_0 → Q4_0")
    assert (found["plain"].found, found["plain"].dtype) == ("values", "F32")
    assert (found["gone"].found, found["new"].found) == ("removed", "added")
    assert found["gone"].blake3_before == found["new"].blake3_after
    assert diff_gguf(a, b).config_changes == {"x": (None, "nan")}


def test_changed_blocks_are_values_whatever_byte_of_them_changed(tmp_path: Path) -> None:
    before = payloads()
    raw = bytearray(before["experts"][2])
    raw[5::144] = bytes(len(raw[5::144]))  # the same byte of every block, zero now: no axis of the tensor
    a = written(tmp_path / "a.gguf", before)
    b = written(tmp_path / "b.gguf", {**before, "experts": (GgmlType.Q4_K, (6, 4, 512), bytes(raw))})
    fact = by_name(a, b)["experts"]
    assert (fact.found, fact.axis, fact.index, fact.relative_change) == ("values", None, None, None)


def test_parts_and_the_whole_are_the_same(tmp_path: Path) -> None:
    tensors = payloads()
    whole = written(tmp_path / "w.gguf", tensors)
    entries = [(name, kind, shape) for name, (kind, shape, _) in tensors.items()]
    for layout in lay_out_split(METADATA, entries, 8000, name="s.gguf"):
        with gguf_writer(tmp_path / layout.name, layout) as writer:
            for name in layout.tensors:
                writer.write(name, 0, memoryview(tensors[name][2]))
    split = open_gguf(next(tmp_path.glob("s-00001-*")))
    assert len(split.parts) > 1
    manifest = diff_gguf(whole, split)
    assert {fact.found for fact in manifest.tensors} == {"same"}
    assert manifest.base_fingerprint == manifest.fingerprint
    assert sorted(manifest.files) == sorted(split.parts)


def test_a_part_of_a_block_cannot_be_taken(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf", payloads())
    assert take_of_blocks(file.ref("columns"), Take(1, tuple(range(256, 768)))) == Take(1, (1, 2))
    assert take_of_blocks(file.ref("columns"), Take(0, (3,))) == Take(0, (3,))
    assert take_of_blocks(file.ref("plain"), Take(1, (2,))) == Take(1, (2,))
    for index in (range(255), range(128, 384)):
        with pytest.raises(UsageError, match="cannot be cut without quantising anew"):
            take_of_blocks(file.ref("columns"), Take(1, tuple(index)))
