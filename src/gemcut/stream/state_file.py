"""Tensors at byte offsets of a file: hidden states between two layers, which a killed pass resumes from.

Plain reads and writes, not a mapping: the page cache keeps what fits, and no page counts as the process's memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gemcut.errors import CheckpointError
from gemcut.store import PARTIAL, disk_errors, fsync_folder


class StateReader:
    """Reads a file of which every byte is a state."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def fill(self, out: torch.Tensor, at: int) -> None:
        """Fill a contiguous tensor on the CPU from byte `at` on.

        Raises:
            CheckpointError: the file is shorter.
        """
        view, done = _bytes_of(out), 0
        while done < len(view):
            n = os.preadv(self._fd, [view[done:]], at + done)
            if n == 0:
                raise CheckpointError("the hidden states ended early", where=self.path.name)
            done += n

    def close(self) -> None:
        os.close(self._fd)


class StateWriter:
    """Writes in any order; the file gets its name when all is in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        with disk_errors(path):
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def put(self, states: torch.Tensor, at: int) -> None:
        """Write a tensor of the CPU at byte `at`."""
        view, done = _bytes_of(states.contiguous()), 0
        with disk_errors(self.path):
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


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
