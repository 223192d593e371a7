"""Hidden states of one stream between two layers: a file that a killed heal resumes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from gemcut.errors import UsageError
from gemcut.stream.corpus import Row
from gemcut.stream.hidden import Batch, make_batches, padded_ids
from gemcut.stream.state_file import StateReader, StateWriter
from gemcut.types import I64


@dataclass(frozen=True, eq=False)
class Layout:
    """The corpus as batches [B, S], right padded, and where each lies in a file of hidden states."""

    rows: Sequence[Row]
    batches: tuple[Batch, ...]
    part_of: I64  # [items] FIT, INNER or HELD_OUT

    @classmethod
    def of(cls, rows: Sequence[Row], part_of: I64, batch_tokens: int, vocabulary: int) -> Layout:
        """Items of about the same length together.

        Raises:
            UsageError: an item has no token, or a token id that the model does not know.
        """
        for row in rows:
            if not len(row.ids) or int(row.ids.min()) < 0 or int(row.ids.max()) >= vocabulary:
                raise UsageError(
                    "an item has token ids that the model does not know",
                    where=f"item {row.id!r}",
                    wanted=f"0 to {vocabulary - 1}",
                    hint="was the corpus tokenised for another model?",
                )
        return cls(rows, tuple(make_batches([len(row.ids) for row in rows], batch_tokens)), part_of)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First padded position of each batch, and the end."""
        return (0, *np.cumsum([batch.positions for batch in self.batches]).tolist())

    @property
    def positions(self) -> int:
        return self.starts[-1]

    def ids(self, k: int) -> torch.Tensor:
        """Token ids of batch k, int64 [B, S]."""
        return padded_ids(self.rows, self.batches[k])

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Classes of text, in alphabetical order."""
        return tuple(sorted({row.cls for row in self.rows}))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Which of FIT, INNER and HELD_OUT there are."""
        return tuple(sorted(set(self.part_of.tolist())))

    def class_of(self, k: int, part: int) -> torch.Tensor:
        """int64 [n]: class of every token that `chosen` gives, as a number in `classes`."""
        rows = [row for row in self.batches[k].rows if self.part_of[row] == part]
        counts = [len(self.rows[row].ids) for row in rows]
        return torch.from_numpy(np.repeat([self.classes.index(self.rows[row].cls) for row in rows], counts))

    def chosen(self, k: int, part: int) -> torch.Tensor:
        """int64 [n]: positions of batch k, flattened, that hold a token of this part."""
        batch = self.batches[k]
        at = [
            np.arange(len(self.rows[row].ids), dtype=np.int64) + i * batch.length
            for i, row in enumerate(batch.rows)
            if self.part_of[row] == part
        ]
        return torch.from_numpy(np.concatenate(at) if at else np.zeros(0, np.int64))

    def name_position(self, k: int, at: int) -> str:
        """Item and token of a flattened position of batch k, for messages."""
        batch = self.batches[k]
        row = self.rows[batch.rows[at // batch.length]]
        return f"item {row.id!r}, token {min(at % batch.length, len(row.ids) - 1)}"


def states_path(folder: Path, stream: str, layer: int) -> Path:
    """Hidden states of a stream ("dense" or "cut") that enter `layer`."""
    return folder / f"{stream}-{layer:03d}.bin"


def states_bytes(layout: Layout, hidden: int, dtype: torch.dtype) -> int:
    """Size of one file."""
    return layout.positions * hidden * dtype.itemsize


class StatesReader(StateReader):
    """Reads batches of one stream at one boundary."""

    def __init__(self, path: Path, layout: Layout, hidden: int, dtype: torch.dtype) -> None:
        super().__init__(path)
        self._layout, self._hidden, self._dtype = layout, hidden, dtype

    def read(self, k: int) -> torch.Tensor:
        """[B, S, H] on the CPU."""
        batch = self._layout.batches[k]
        out = torch.empty((len(batch.rows), batch.length, self._hidden), dtype=self._dtype)
        self.fill(out, self._layout.starts[k] * self._hidden * self._dtype.itemsize)
        return out


class StatesWriter(StateWriter):
    """Writes batches of one stream at one boundary."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path)
        self._layout = layout

    def write(self, k: int, hidden: torch.Tensor) -> None:
        """hidden [B, S, H]."""
        self.put(hidden.cpu(), self._layout.starts[k] * hidden.shape[-1] * hidden.dtype.itemsize)
