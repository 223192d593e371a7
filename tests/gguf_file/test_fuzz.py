"""A hundred thousand broken headers: each is read or refused with a typed error, and none makes the memory grow."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemcut.errors import CheckpointError
from gemcut.ggml.types import BLOCKS
from gemcut.gguf_file import read_gguf
from gguf_file.raw_gguf import FORMS, TENSORS, TYPES, Raw, pair

MUTATIONS = 100_000
EDGES = (0, 1, 2, 31, 32, 33, 63, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1,
         2**63, 2**64 - 32, 2**64 - 1)  # fmt: skip


def every_kind() -> bytes:
    """A right file with a scalar and an array of every type."""
    values = dict.fromkeys(FORMS, 1) | {"str": "text"}
    scalars = [pair(f"s.{kind}", kind, value) for kind, value in values.items()]
    arrays = [pair(f"a.{kind}", kind, [value] * 3) for kind, value in values.items()]
    assert set(values) == set(TYPES) - {"arr"}
    return Raw(pairs=(pair("general.alignment", "u32", 32), *scalars, *arrays), tensors=TENSORS).build()


def mutations(seeds: list[bytes], count: int) -> Iterator[bytes]:
    """Bits flipped, bytes and numbers replaced, stretches cut out, doubled and moved, the end cut off."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        raw = bytearray(seeds[int(rng.integers(len(seeds)))])
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(raw) or 1))
            match int(rng.integers(7)):
                case 0:
                    raw[at : at + 1] = bytes([raw[at] ^ 1 << int(rng.integers(8))]) if raw else b"\0"
                case 1:
                    raw[at : at + 1] = bytes([int(rng.integers(256))])
                case 2:
                    raw[at : at + 8] = struct.pack("<Q", EDGES[int(rng.integers(len(EDGES)))])
                case 3:
                    raw[at : at + 4] = struct.pack("<I", EDGES[int(rng.integers(len(EDGES)))] & 0xFFFFFFFF)
                case 4:
                    del raw[at : at + int(rng.integers(1, 40))]
                case 5:
                    stretch = raw[at : at + int(rng.integers(1, 40))]
                    to = int(rng.integers(len(raw) or 1))
                    raw[to:to] = stretch
                case _:
                    del raw[int(rng.integers(len(raw) or 1)) :]
        yield bytes(raw)


def reading(path: Path) -> bool:
    """Whether it was read; then everything in it is inside the file and fits together."""
    said = ""
    try:
        found = read_gguf(path)
    except CheckpointError as error:
        said = str(error)
    if said:
        assert len(said.encode()) < 2000  # a message that can be printed
        return False
    at = found.data_start
    for ref in found.tensors.values():
        elements = int(np.prod(ref.shape, dtype=object))
        assert ref.start == at
        assert ref.size_bytes * BLOCKS[ref.kind].values == elements * BLOCKS[ref.kind].size_bytes
        assert ref.start + ref.size_bytes <= found.size_bytes
        at += ref.size_bytes + -ref.size_bytes % found.alignment
    return True


@pytest.mark.slow
def test_mutated_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seeds = [Raw().build(), every_kind()]
    read = 0
    for number, raw in enumerate(mutations(seeds, MUTATIONS)):
        os.ftruncate(fd, 0)
        os.pwrite(fd, raw, 0)
        if number % 50 == 0:
            os.ftruncate(fd, 1 << 30)  # sparse: claims of up to a gigabyte are inside the file
        read += reading(path)
    os.close(fd)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 64 << 20, f"{grown >> 20} MiB"
    assert MUTATIONS // 100 < read < MUTATIONS // 2  # neither everything nor nothing gets through
