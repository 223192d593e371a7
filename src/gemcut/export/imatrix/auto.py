"""Which variant serves a tensor best: asked of the real quantiser, on the half of the corpus that no importance saw.

    error(v) = Σ_u Σ_c A[u, c] · Σ_r (W − Ŵ_v)²[u, r, c]      A = Σ a² of the second half of the questions

Ŵ_v: the tensor in its type, quantised with importances v of the first half. Dividing by the error of `plain` makes
tensors comparable. Rows are quantised apart from one another, so a sample of them says enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.export.imatrix.starved import PRIOR_TOKENS
from gemcut.export.imatrix.statistics import observed
from gemcut.export.imatrix.variants import FORMULAS, importance, moments
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
    """One tensor. errors: by variant, as a share of plain's error; variant: the least of them."""

    tensor: str
    role: str
    layer: int | None
    type: str
    variant: str
    errors: Mapping[str, float]


def choose(
    folder: Path,
    layout: GgufLayout,
    checkpoint: Checkpoint,
    types: Mapping[str, GgmlType],
    *,
    candidates: Iterable[str] = tuple(FORMULAS),
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
        errors = _errors(checkpoint, tensor, sums, kind, names, prior, rows, threads)
        base = errors["plain"] or 1.0
        best = min(names, key=errors.__getitem__)  # the first of equals: plain
        shares = {name: error / base for name, error in errors.items()}
        out.append(Choice(tensor.name, tensor.role, tensor.layer, kind.name, best, shares))
        if progress is not None:
            progress(len(out), max(len(wanted), len(out)), "judging importances")
    return tuple(out)


def _errors(
    checkpoint: Checkpoint,
    tensor: GgufTensor,
    sums: LinearSums,
    kind: GgmlType,
    names: tuple[str, ...],
    prior: int,
    rows: int,
    threads: int,
) -> dict[str, float]:
    seen, held = moments(sums, BUILD, prior), sums.a2[list(JUDGE)].sum(0)
    energy = column_energy(checkpoint, tensor) if any(FORMULAS[name].weights for name in names) else None
    made = {name: importance(name, seen, energy).astype(np.float32) for name in names}
    errors = dict.fromkeys(names, 0.0)
    for unit, values in enumerate(some_rows(checkpoint, tensor, rows)):
        if not held[unit].any():
            continue  # nobody spoke to this expert: it has no say
        for name in names:
            off = _error_of(values, kind, made[name][unit], threads, tensor.name)
            errors[name] += float(off @ held[unit])
    return errors


def _error_of(values: F32, kind: GgmlType, importances: F32, threads: int, name: str) -> F64:
    """Σ_r (W − Ŵ)² of every column, float64 [F]."""
    raw = np.empty(tensor_bytes(kind, values.shape), np.uint8)
    quantise(values, kind, importances, raw, threads=threads, name=name)
    off = values - dequantise(raw, kind, values.shape)
    out: F64 = np.einsum("rc,rc->c", off, off, dtype=np.float64)
    return out
