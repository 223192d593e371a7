"""Shards on their way: what arrives is read back, and a file passed through once does not fill the memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.tiny import make_tiny

from gemcut.checkpoint import open_checkpoint, transfer, write_checkpoint
from gemcut.errors import CheckpointError
from gemcut.types import Take


def test_a_byte_that_the_disk_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(make_tiny(tmp_path / "base"))
    name = next(n for n in base.tensors if n.endswith("experts.down_proj"))
    real = transfer.write_all

    def rotten(fd: int, piece: memoryview) -> None:
        if os.lseek(fd, 0, os.SEEK_CUR) > 20_000:
            bad = bytearray(piece)
            bad[len(bad) // 2] ^= 1
            piece = memoryview(bad)
        real(fd, piece)

    monkeypatch.setattr(transfer, "write_all", rotten)
    for edits in ({}, {name: Take(0, tuple(range(base.tensors[name].shape[0])))}):
        with pytest.raises(CheckpointError, match="does not read back"):
            write_checkpoint(base, edits, base.config, tmp_path / "out", link=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in memory")
def test_only_what_was_not_in_memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_DROP_BYTES", 1 << 20)
    size = 8 << 20
    (tmp_path / "f").write_bytes(os.urandom(size))
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        os.fsync(fd)
        if not transfer._in_memory(fd, size):
            pytest.skip("this file system does not say what is in memory")
        for cached in (True, False):
            if not cached:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            passing = transfer._PassingThrough(fd, size)
            for _ in range(8):
                os.preadv(fd, [bytearray(1 << 20)], passing._seen)
                passing.seen(1 << 20)
            assert transfer._in_memory(fd, size) == cached
    finally:
        os.close(fd)
