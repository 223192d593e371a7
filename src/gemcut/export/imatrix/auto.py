"""Which variant serves a tensor best: asked of the real quantiser, on the half of the corpus that no importance saw.

    error(v) = Σ_u n_u · Σ_r ( Σ_c s[u, c]·d_rc² + (Σ_c μ[u, c]·d_rc)² )      d = W − Ŵ_v of unit u

Ŵ_v: the tensor in its type, quantised with importances v of the first half of the questions; n, μ and s = e − μ² are of
the second half (without means, μ = 0): the squared error of the outputs, the inputs' covariances left out. Dividing by
the error of `plain` makes tensors comparable. Rows are quantised apart from one another, so a sample of them will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.export.imatrix.blocks import Roundings, quantise_blocks
from gemcut.export.imatrix.blocks import roundings as several
from gemcut.export.imatrix.starved import PRIOR_TOKENS
from gemcut.export.imatrix.statistics import observed
from gemcut.export.imatrix.variants import FORMULAS, Moments, importance, moments
from gemcut.export.imatrix.weights import column_energy, some_rows
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.quantise import dequantise, quantise
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.records.linears import LinearSums
from gemcut.records.statistics import load_statistics_index
from gemcut.types import F32, F64

SAMPLE_ROWS = 4096  # of a tensor
BUILD, JUDGE = (0,), (1,)  # halves of the corpus
_UNQUANTISED = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Choice:
    """One tensor. errors: by variant, as a share of plain's error; variant: the least of them.

    rounded: the same share where each block of the chosen variant is picked of several roundings; 1 where none is, or
    where that does not help.
    """

    tensor: str
    role: str
    layer: int | None
    type: str
    variant: str
    errors: Mapping[str, float]
    rounded: float = 1.0

    @property
    def picks(self) -> bool:
        """Whether its blocks are worth picking."""
        return self.rounded < self.errors[self.variant]


def choose(
    folder: Path,
    layout: GgufLayout,
    checkpoint: Checkpoint,
    types: Mapping[str, GgmlType],
    *,
    candidates: Iterable[str] = tuple(FORMULAS),
    roundings: int = 1,
    prior: int = PRIOR_TOKENS,
    rows: int = SAMPLE_ROWS,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[Choice, ...]:
    """The best variant of every tensor that will be quantised, in the layout's order of layers.

    Args:
        types: tensor name → the type that it will have.
        rows: looked at per tensor.

    Raises:
        UsageError, CheckpointError: as `from_statistics` and the quantisers do.
    """
    index = load_statistics_index(folder)
    names = tuple(dict.fromkeys(("plain", *candidates)))
    wanted = [name for name, kind in types.items() if kind not in _UNQUANTISED and name.startswith("blk.")]
    out: list[Choice] = []
    for tensor, sums in observed(folder, index, layout):
        kind = types[tensor.name]
        if kind in _UNQUANTISED:
            continue
        trial = _Trial.of(checkpoint, tensor, sums, kind, prior, rows, threads)
        errors = {name: trial.error(name) for name in names}
        base = errors["plain"] or 1.0
        best = min(names, key=errors.__getitem__)  # the first of equals: plain
        rounded = trial.error(best, roundings) / base if roundings > 1 else 1.0
        shares = {name: error / base for name, error in errors.items()}
        out.append(Choice(tensor.name, tensor.role, tensor.layer, kind.name, best, shares, rounded))
        if progress is not None:
            progress(len(out), max(len(wanted), len(out)), "judging importances")
    return tuple(out)


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """One tensor under trial: some of its rows, what the first half says, and what the second judges by."""

    name: str
    kind: GgmlType
    values: tuple[F32, ...]  # of each unit, [R, F]
    seen: Moments
    held: Moments
    energy: F64 | None
    threads: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        tensor: GgufTensor,
        sums: LinearSums,
        kind: GgmlType,
        prior: int,
        rows: int,
        threads: int,
    ) -> _Trial:
        values = tuple(some_rows(checkpoint, tensor, rows))
        energy = column_energy(checkpoint, tensor)
        return cls(tensor.name, kind, values, moments(sums, BUILD, prior), moments(sums, JUDGE, 0), energy, threads)

    def error(self, variant: str, roundings: int = 1) -> float:
        """Held-out error; of a picked quantisation where there are several roundings."""
        made = importance(variant, self.seen, self.energy).astype(np.float32)
        inputs = self.seen.inputs
        judge = self.held.inputs or (np.zeros_like(self.held.a2), self.held.a2 / np.maximum(self.held.n, 1)[:, None])
        total = 0.0
        for unit, values in enumerate(self.values):
            if not self.held.n[unit]:
                continue  # nobody spoke to this expert: it has no say
            raw = np.empty(tensor_bytes(self.kind, values.shape), np.uint8)
            if roundings > 1 and inputs is not None:
                mean, spread = (part[unit].astype(np.float32) for part in inputs)
                given = Roundings(several(made[unit], roundings), mean, spread)
                quantise_blocks(values, self.kind, given, raw, threads=self.threads, name=self.name)
            else:
                quantise(values, self.kind, made[unit], raw, threads=self.threads, name=self.name)
            off = values - dequantise(raw, self.kind, values.shape)
            along = off @ judge[0][unit]
            total += self.held.n[unit] * float(((off * off) @ judge[1][unit]).sum() + along @ along)
        return total
