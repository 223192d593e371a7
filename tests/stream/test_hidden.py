"""Batches lose no item and little padding; slabs keep their memory promise and leave no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemcut.errors import MissingError
from gemcut.stream.hidden import Slabs, make_batches, rows_per_tile


@given(lengths=st.lists(st.integers(2, 5000), min_size=1, max_size=80), batch_tokens=st.integers(1, 10_000))
def test_batches_hold_every_item_once_with_little_padding(lengths: list[int], batch_tokens: int) -> None:
    batches = make_batches(lengths, batch_tokens)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[row] for row in batch.rows]
        assert max(sizes) <= batch.length
        assert batch.positions <= max(batch_tokens, batch.length)
        assert sum(sizes) >= 0.87 * batch.positions


def test_equal_lengths_share_their_shape() -> None:
    batches = make_batches([512] * 17, 2048)
    assert [len(batch.rows) for batch in batches] == [4, 4, 4, 4, 1]
    assert {batch.length for batch in batches} == {512}


def test_slabs_beyond_the_budget_lie_in_nameless_files(tmp_path: Path) -> None:
    slabs = Slabs(4096, tmp_path / "scratch")
    first = slabs.make(16, 64, torch.float32)
    second = slabs.make(8, 64, torch.bfloat16)
    assert (slabs.memory_bytes, slabs.on_disk_bytes) == (0, 1024)
    second.copy_(torch.arange(512).view(8, 64))
    assert second[7, 63] == 512  # bf16 rounds 511
    assert os.listdir(tmp_path / "scratch") == []
    slabs.release(first)
    assert slabs.memory_bytes == 4096
    slabs.release(second)
    assert slabs.memory_bytes == 4096


def test_a_disk_without_room_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="not enough disk space"):
        Slabs(0, tmp_path).make(1 << 40, 1 << 10, torch.float32)
    assert os.listdir(tmp_path) == []


def test_tiles_of_a_large_vocabulary_are_small() -> None:
    assert rows_per_tile(262_144) == 32
    assert rows_per_tile(320) == 256
    assert rows_per_tile(1 << 30) == 1
