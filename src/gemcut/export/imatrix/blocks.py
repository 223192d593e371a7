"""Of several quantisations of the same rows, the best block by block, by the error that the next layer sees.

For inputs a with mean μ and second moment e, and errors d = w − ŵ of one row of weights,

    E[(d·a)²] ≈ Σ_c (e_c − μ_c²)·d_c² + (Σ_c μ_c·d_c)²

what is left out is how the inputs vary together. An importance only weighs columns, so the quantiser cannot see the
second term. Each importance gives another rounding of the same quality; blocks are stored apart from one another, so
each may come from another rounding, and they are picked so that what they add to Σ μ·d cancels: coordinate descent over
the blocks of a row, all rows at once. The bytes are those of the type, and any reader takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemcut.ggml.library import Library
from gemcut.ggml.quantise import dequantise, quantise
from gemcut.ggml.types import BLOCKS, GgmlType
from gemcut.types import F32, F64, I64

_SWEEPS = 4
_SPREAD = 0.5  # of the logarithm of an importance: far enough for other roundings, near enough for good ones
_POWERS = (0.5, 1.2)


@dataclass(frozen=True, slots=True, eq=False)
class Roundings:
    """What a block may be quantised with, and what it is judged by: all float32 [F].

    importances: the first is what the choice starts from.   mean, spread: μ and e − μ² of the inputs.
    """

    importances: tuple[F32, ...]
    mean: F32
    spread: F32


def roundings(importance: F32, count: int) -> tuple[F32, ...]:
    """`count` importances [F] around one: itself, its square root, then p^u·exp(0.5·z), u uniform, z normal.

    The draws are the same for every tensor and expert, so that what is cut away elsewhere changes no byte.
    """
    rng = np.random.default_rng(0)
    out = [importance, np.sqrt(importance)]
    while len(out) < count:
        power = rng.uniform(*_POWERS)
        out.append(importance**power * np.exp(_SPREAD * rng.standard_normal(len(importance))))
    return tuple(np.ascontiguousarray(one, np.float32) for one in out[:count])


def quantise_blocks(
    values: F32,
    kind: GgmlType,
    given: Roundings,
    out: NDArray[np.uint8],
    *,
    threads: int = 1,
    name: str = "tensor",
    library: Library | None = None,
) -> None:
    """Write `values` [R, F] as `kind` into `out`, every block from the importances that serve it best.

    Rows are taken apart from one another: pieces and threads change nothing.

    Raises:
        UsageError, CheckpointError: as `quantise`.
    """
    rows, columns = values.shape
    width = BLOCKS[kind].values
    shape = (len(given.importances), rows, columns // width)
    local, along = np.empty(shape, np.float32), np.empty(shape, np.float32)
    raws = np.empty((*shape, BLOCKS[kind].size_bytes), np.uint8)
    for k, importance in enumerate(given.importances):
        raw = raws[k].reshape(-1)
        quantise(values, kind, importance, raw, threads=threads, name=name, library=library)
        off = values - dequantise(raw, kind, values.shape, library=library)
        along[k] = (off * given.mean).reshape(*shape[1:], width).sum(-1)
        off *= off
        local[k] = (off * given.spread).reshape(*shape[1:], width).sum(-1)
    chosen = choose_blocks(local, along)
    out[:] = np.take_along_axis(raws, chosen[None, :, :, None], axis=0).reshape(-1)


def choose_blocks(local: F32, along: F32) -> I64:
    """int64 [R, B]: which k of local, along [K, R, B] makes Σ_b local + (Σ_b along)² small in every row.

    Descents from three starts, the best of each row: never worse than all blocks of k = 0.
    """
    rows = local.shape[1]
    best = np.full(rows, np.inf)
    out = np.zeros(local.shape[1:], np.int64)
    for start in (np.zeros_like(out), np.argmin(local, axis=0), np.argmin(local + along**2, axis=0)):
        chosen = _descend(local, along, start)
        cost = _taken(local, chosen).sum(-1) + _taken(along, chosen).sum(-1) ** 2
        better = cost < best
        best[better], out[better] = cost[better], chosen[better]
    return out


def _taken(values: F32, chosen: I64) -> F64:
    """[R, B] of [K, R, B]."""
    out: F64 = np.take_along_axis(values, chosen[None], axis=0)[0].astype(np.float64)
    return out


def _descend(local: F32, along: F32, chosen: I64) -> I64:
    """One block after the other takes what is best beside all others, until nothing changes."""
    rows, blocks = chosen.shape
    total, at = _taken(along, chosen).sum(-1), np.arange(rows)
    for _ in range(_SWEEPS):
        before = chosen.copy()
        for b in range(blocks):
            rest = total - along[chosen[:, b], at, b]
            chosen[:, b] = np.argmin(local[:, :, b] + (rest + along[:, :, b]) ** 2, axis=0)
            total = rest + along[chosen[:, b], at, b]
        if (before == chosen).all():
            break
    return chosen
