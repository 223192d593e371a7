"""Hidden states of the whole corpus between two layers: one file per layer boundary, in corpus order, no padding."""

from __future__ import annotations

from pathlib import Path

import torch

from gemcut.errors import CheckpointError
from gemcut.observe.batches import Batch
from gemcut.stream.state_file import StateReader, StateWriter


def hidden_path(folder: Path, layer: int) -> Path:
    """Hidden states that enter `layer`."""
    return folder / f"hidden-{layer:03d}.bin"


class HiddenReader(StateReader):
    """Reads batches of one boundary."""

    def __init__(self, path: Path, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__(path)
        self.hidden, self.dtype = hidden, dtype
        self._row = hidden * dtype.itemsize
        size = self.size_bytes
        if size != tokens * self._row:
            self.close()
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
            self.fill(out[row, :length], start * self._row)
        return out


class HiddenWriter(StateWriter):
    """Writes batches of one boundary."""

    def write(self, batch: Batch, hidden: torch.Tensor) -> None:
        """hidden [B, S, H]; padding is left out."""
        hidden = hidden.cpu()
        size = hidden.shape[-1] * hidden.dtype.itemsize
        for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            self.put(hidden[row, :length], start * size)
