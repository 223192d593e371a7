"""Hidden states of the whole corpus between two layers: one file per layer boundary, in corpus order.

Plain reads and writes, not a mapping: the page cache keeps what fits, and no page counts as the process's memory.
The file is also what a killed pass resumes from.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gemcut.errors import CheckpointError
from gemcut.observe.batches import Batch
from gemcut.store import PARTIAL, disk_errors, fsync_folder


def hidden_path(folder: Path, layer: int) -> Path:
    """Hidden states that enter `layer`."""
    return folder / f"hidden-{layer:03d}.bin"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


class HiddenReader:
    """Reads batches of one boundary."""

    def __init__(self, path: Path, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        self.path, self.hidden, self.dtype = path, hidden, dtype
        self._row = hidden * dtype.itemsize
        self._fd = os.open(path, os.O_RDONLY)
        size = os.fstat(self._fd).st_size
        if size != tokens * self._row:
            os.close(self._fd)
            raise CheckpointError(
                "the hidden states on disk are not those of this corpus",
                where=path.name,
                got=f"{size} bytes",
                wanted=f"{tokens * self._row} bytes",
                hint="pass --force to observe from the beginning",
            )

    def read(self, batch: Batch) -> torch.Tensor:
        """[B, S, H] on the CPU, zeros at padding."""
        out = torch.zeros(len(batch.items), batch.width, self.hidden, dtype=self.dtype)
        for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            view, at, done = _bytes_of(out[row, :length]), start * self._row, 0
            while done < len(view):
                n = os.preadv(self._fd, [view[done:]], at + done)
                if n == 0:
                    raise CheckpointError("the hidden states ended early", where=self.path.name)
                done += n
        return out

    def close(self) -> None:
        os.close(self._fd)


class HiddenWriter:
    """Writes batches of one boundary, in any order; the file gets its name when all are in."""

    def __init__(self, path: Path, hidden: int, dtype: torch.dtype) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._row = hidden * dtype.itemsize
        with disk_errors(path):
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, batch: Batch, hidden: torch.Tensor) -> None:
        """hidden [B, S, H]; padding is left out."""
        hidden = hidden.cpu()
        with disk_errors(self.path):
            for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
                view, at, done = _bytes_of(hidden[row, :length].contiguous()), start * self._row, 0
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], at + done)

    def commit(self) -> None:
        """Make the file durable under its name."""
        with disk_errors(self.path):
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.replace(self._partial, self.path)
            fsync_folder(self.path.parent)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
