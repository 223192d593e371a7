"""All items through all layers of one checkpoint: what comes out before the head, and nothing else kept.

Hidden states between the layers live in one slab, in memory or in a file that has no name any more: a kill leaves
nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gemcut.errors import QualityError
from gemcut.store import disk_errors, need_disk
from gemcut.stream.corpus import Row
from gemcut.stream.model import StreamedModel

BATCH_TOKENS = 4096
_TILE_ELEMENTS = 8 << 20
_MAX_ROWS = 256

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that go through a layer together, right padded to `length` tokens."""

    rows: tuple[int, ...]
    length: int

    @property
    def positions(self) -> int:
        return len(self.rows) * self.length


def make_batches(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Items of about the same length together, at most `batch_tokens` padded positions (one item always fits).

    Lengths are padded up a ladder of eight steps per octave: under 13 % of padding, and few different shapes, so that
    masks and rotary embeddings are made once per shape.
    """
    groups: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        groups.setdefault(_padded(lengths[row]), []).append(row)
    batches = []
    for rows in groups.values():
        longest = max(lengths[row] for row in rows)  # a group never needs more than its longest item
        size = max(1, batch_tokens // longest)
        batches += [Batch(tuple(rows[i : i + size]), longest) for i in range(0, len(rows), size)]
    return batches


def _padded(length: int) -> int:
    step = max(1, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class Slabs:
    """Tensors [rows, H] for hidden states: in memory while they fit `memory_bytes` together, then in nameless files."""

    def __init__(self, memory_bytes: int, scratch: Path | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.scratch = Path(tempfile.gettempdir()) if scratch is None else scratch
        self.on_disk_bytes = 0
        self._in_memory: dict[int, int] = {}

    def make(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised slab [rows, width].

        Raises:
            MissingError: it has to lie on disk, and the disk has no room.
        """
        size = rows * width * dtype.itemsize
        if size <= self.memory_bytes:
            self.memory_bytes -= size
            slab = torch.empty((rows, width), dtype=dtype)
            self._in_memory[id(slab)] = size
            return slab
        need_disk(self.scratch, size)
        self.on_disk_bytes += size
        with disk_errors(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(prefix="gemcut-hidden-", suffix=".partial", dir=self.scratch)
            try:
                os.posix_fallocate(fd, 0, size)  # a sparse map on a full disk would die of SIGBUS much later
                flat = torch.from_file(name, shared=True, size=rows * width, dtype=dtype)
            finally:
                os.close(fd)
                os.unlink(name)
        return flat.view(rows, width)

    def release(self, slab: torch.Tensor) -> None:
        """The caller drops this slab: its memory may be given out again."""
        self.memory_bytes += self._in_memory.pop(id(slab), 0)


def scored_positions(rows: Sequence[Row]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64 [items + 1]: where each item's scored positions begin; an item of T tokens has T − 1 of them."""
    return np.concatenate([[0], np.cumsum([len(row.ids) - 1 for row in rows])]).astype(np.int64)


def final_hidden(
    model: StreamedModel,
    rows: Sequence[Row],
    slabs: Slabs,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    label: str = "layers",
) -> torch.Tensor:
    """The last layer's output (before the final norm) at every position that has a next token.

    Args:
        rows: items of token ids [T], BOS first.
        slabs: gives the two slabs: the working one [padded positions, H] and the result.
        progress: called with (layers done, layers, label).
    Returns:
        [Σ(T − 1), H] in the model's compute dtype, items in order, on the CPU.
    Raises:
        QualityError: a hidden state is not finite; names the layer and the item.
    """
    batches = make_batches([len(row.ids) for row in rows], batch_tokens)
    work = slabs.make(sum(b.positions for b in batches), model.hidden_size, model.dtype)
    edges = np.concatenate([[0], np.cumsum([b.positions for b in batches])]).tolist()
    views = [
        work[edges[i] : edges[i + 1]].view(len(b.rows), b.length, model.hidden_size) for i, b in enumerate(batches)
    ]
    for batch, view in zip(batches, views, strict=True):
        view.copy_(model.embed(padded_ids(rows, batch)))
    for i in range(model.n_layers):
        with model.layer(i) as layer:
            model.prefetch(i + 1)
            for batch, view in zip(batches, views, strict=True):
                out = model.run_layer(layer, view.to(model.device))
                if (bad := not_finite(rows, batch, out)) is not None:
                    raise QualityError(
                        "a hidden state is not finite",
                        where=f"{model.checkpoint.name}, layer {i}, {bad}",
                        hint="compute in float32, or look for the broken tensor with gemcut diff",
                    )
                view.copy_(out)
        if progress is not None:
            progress(i + 1, model.n_layers, label)
    begins = scored_positions(rows)
    kept = slabs.make(int(begins[-1]), model.hidden_size, model.dtype)
    for batch, view in zip(batches, views, strict=True):
        for at, row in enumerate(batch.rows):
            kept[begins[row] : begins[row + 1]] = view[at, : len(rows[row].ids) - 1]
    slabs.release(work)
    return kept


def padded_ids(rows: Sequence[Row], batch: Batch) -> torch.Tensor:
    """int64 [B, S]. Padding repeats the item's last token: an ordinary token, which nothing real can see."""
    ids = np.stack([np.pad(rows[r].ids, (0, batch.length - len(rows[r].ids)), mode="edge") for r in batch.rows])
    return torch.from_numpy(ids)


def not_finite(rows: Sequence[Row], batch: Batch, out: torch.Tensor) -> str | None:
    """The first real token whose state [B, S, H] is not finite, in words; None where there is none."""
    if bool(torch.isfinite(out).all()):
        return None
    for at, row in enumerate(batch.rows):
        bad = torch.nonzero(~torch.isfinite(out[at, : len(rows[row].ids)]).all(-1))
        if len(bad):
            return f"item {rows[row].id!r}, token {int(bad[0])}"
    return None


def rows_per_tile(vocabulary: int) -> int:
    """Positions whose logits are in memory at once: 32 MiB of them in float32, and some four times that in float64."""
    return max(1, min(_MAX_ROWS, _TILE_ELEMENTS // vocabulary))
