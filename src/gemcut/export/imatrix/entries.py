"""What an importance matrix is, and how llama-quantize reads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from gemcut.errors import CheckpointError
from gemcut.export.imatrix.blocks import Roundings, roundings
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.types import F32, F64, I64

log = logging.getLogger(__name__)

Variant: TypeAlias = Literal["plain", "hybrid", "rms4", "max", "auto"]
"""`plain` holds sums of squares, which add up over corpora. The others hold importances times counts, which do not."""

MAX_ROUNDINGS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One tensor: sums float32 [U, F] over the rows a [T, F] that entered each unit, counts int64 [U] of those rows.

    U: experts of a fused tensor, else 1.   Importance of column f of unit u: sums[u, f] / counts[u].
    """

    sums: F32
    counts: I64

    def __post_init__(self) -> None:
        if self.sums.ndim != 2 or self.counts.shape != self.sums.shape[:1] or not self.sums.size:
            raise CheckpointError(
                "sums and counts do not belong together", got=(self.sums.shape, self.counts.shape), wanted="[U, F], [U]"
            )
        if not np.isfinite(self.sums).all():
            raise CheckpointError(
                "the sums hold NaN or infinity",
                got=f"{int((~np.isfinite(self.sums)).sum())} values",
                wanted="finite sums",
            )
        if self.sums.min() < 0 or self.counts.min() < 0:
            raise CheckpointError(
                "a sum of squares or a count is negative",
                got=float(min(self.sums.min(), self.counts.min())),
                wanted="0 or more",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What the rows a that entered a tensor have in common: mean = E[a], spread = E[a²] − E[a]², float32 [U, F]."""

    mean: F32
    spread: F32

    def __post_init__(self) -> None:
        if self.mean.shape != self.spread.shape or self.mean.ndim != 2:
            raise CheckpointError("means and spreads do not belong together", got=(self.mean.shape, self.spread.shape))
        if not (np.isfinite(self.mean).all() and np.isfinite(self.spread).all()) or self.spread.min() < 0:
            raise CheckpointError("a mean or a spread of inputs is impossible", wanted="finite, spreads of 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Imatrix:
    """An importance matrix: entries by the tensor's name in GGUF.

    datasets, chunks, chunk_size: what llama.cpp's header says of the text.
    variant: what the sums are made of.
    prior_tokens: κ of the units in `starved` (tensor → units): their sums hold κ rows of their layer's mean more, and
        their counts κ rows more, than were seen; see `shrink`.
    roundings: of how many quantisations each block is picked, where `inputs` says by what; see `blocks`. 1: as
        llama-quantize, which knows nothing of both.
    model_fingerprint, corpus_hash: "" where nobody said.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    variant: Variant = "plain"
    prior_tokens: int = 0
    starved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    roundings: int = 1
    inputs: Mapping[str, Inputs] = field(default_factory=dict)
    model_fingerprint: str = ""
    corpus_hash: str = ""

    def importance(self, name: str, unit: int = 0) -> F32 | None:
        """float32 [F] as llama-quantize derives it: sums / counts in float32; ones where nothing was counted.

        None where the tensor has no entry: it is then quantised without importances, or refused by its type.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        count = int(entry.counts[unit])
        if count == 0:
            return np.ones(entry.sums.shape[1], np.float32)
        out: F32 = entry.sums[unit] / np.float32(count)
        return out

    def blocks(self, name: str, unit: int = 0) -> Roundings | None:
        """What the blocks of a unit are picked from; None where they are quantised once, as llama-quantize does."""
        inputs, importance = self.inputs.get(name), self.importance(name, unit)
        if self.roundings < 2 or inputs is None or importance is None:
            return None
        return Roundings(roundings(importance, self.roundings), inputs.mean[unit], inputs.spread[unit])

    def tokens(self, name: str) -> I64:
        """Rows that each unit of a tensor has really seen, int64 [U]."""
        counts = self.entries[name].counts.copy()
        counts[list(self.starved.get(name, ()))] -= self.prior_tokens
        return counts


def wants_importance(tensor: GgufTensor) -> bool:
    """Whether rows of activations enter this tensor and it can be quantised."""
    return tensor.layer is not None and tensor.source is not None and len(tensor.shape) >= 2 and not tensor.keep_f32


def fit(imatrix: Imatrix, layout: GgufLayout) -> Imatrix:
    """The same importances with every entry in the shape [U, F] that the layout gives its tensor.

    A single count for a tensor of several units (older files) counts for each of them.

    Raises:
        CheckpointError: it is the importance matrix of another model: a tensor that the layout does not have, or
            another shape.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    entries: dict[str, Entry] = {}
    for name, entry in imatrix.entries.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                "the imatrix is of another model: it names a tensor that this one has not", where=name[:200]
            )
        units, columns = _units(tensor), tensor.shape[-1]
        if entry.sums.size != units * columns or len(entry.counts) not in (1, units):
            raise CheckpointError(
                "the imatrix is of another model: a tensor has another shape",
                where=name,
                got=f"{entry.sums.size} sums, {len(entry.counts)} counts",
                wanted=f"{units} × {columns}",
                hint="after a cut, take the kept experts: gemcut imatrix FILE --model BASE --plan PLAN -o CUT_FILE",
            )
        inputs = imatrix.inputs.get(name)
        if inputs is not None and inputs.mean.shape != (units, columns):
            raise CheckpointError("means of another shape", where=name, got=inputs.mean.shape, wanted=(units, columns))
        counts = entry.counts if len(entry.counts) == units else np.repeat(entry.counts, units)
        entries[name] = Entry(entry.sums.reshape(units, columns), counts)
    missing = missing_entries(imatrix, layout)
    if missing:
        log.warning("%d tensors have no importances, %s among them", len(missing), missing[0])
    return replace(imatrix, entries=entries)


def missing_entries(imatrix: Imatrix, layout: GgufLayout) -> tuple[str, ...]:
    """Tensors of the layout that could have an entry and have none."""
    return tuple(t.name for t in layout.tensors if wants_importance(t) and t.name not in imatrix.entries)


def _units(tensor: GgufTensor) -> int:
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def entry_of(sums: F64, counts: F64) -> Entry:
    """An entry from float64 sums [U, F] and counts [U]."""
    return Entry(sums.astype(np.float32), np.rint(counts).astype(np.int64))
