"""States in a file: written in any order, there only when all are in, and never short without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemcut.errors import CheckpointError
from gemcut.stream.state_file import StateReader, StateWriter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_went_in_comes_out(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "states.bin"
    states = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = 4 * dtype.itemsize
    writer = StateWriter(path)
    writer.put(states[6:], 6 * size)
    writer.put(states.T[:, :6].T, 0)  # a view that is not contiguous
    assert not path.exists()
    writer.commit()
    writer.close()
    reader = StateReader(path)
    assert reader.size_bytes == 10 * size
    out = torch.empty(3, 4, dtype=dtype)
    reader.fill(out, 5 * size)
    assert torch.equal(out, states[5:8])
    with pytest.raises(CheckpointError, match="ended early"):
        reader.fill(out, 8 * size)
    reader.close()


def test_what_is_not_committed_has_no_name(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path / "states.bin")
    writer.put(torch.ones(4), 0)
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["states.bin.partial"]
