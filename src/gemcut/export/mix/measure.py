"""What every tensor loses in every type, in nats of KLD: rounded by the real quantisers, weighed by the curvature.

    damage[t, k] = 1/(2N) · Σ_u Σ_ij rows[u, i]·columns[u, j]/total[u] · (w[u, i, j] − ŵ_k[u, i, j])²

with the margins and the number N of predictions of `records.curvature`, ŵ_k what type k makes of the weights w with the
importances that the file will be written with. Of large tensors a sample of whole rows is taken, evenly spaced, and
the sum is scaled by the curvature that the sample holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from blake3 import blake3

from gemcut.checkpoint import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.mix.padding import grow_margins
from gemcut.export.mix.shapes import quantisable
from gemcut.export.mix.stock import wants_imatrix
from gemcut.export.source import Buffers, Piece, Source
from gemcut.export.targets import Importances, units
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.library import Library, load
from gemcut.ggml.quantise import dequantise, quantise, requires_imatrix
from gemcut.ggml.types import GgmlType, fits, tensor_bytes
from gemcut.records.curvature import Curvature, Margins
from gemcut.records.fields import open_record
from gemcut.store import write_json
from gemcut.types import F32, F64, Json

Progress = Callable[[int, int, str], None]
DAMAGE_SCHEMA = 1
SAMPLE_ELEMENTS = 1 << 21  # of one tensor: 390 rows of 31B's hidden size

# What a mix is made of. Q1_0, Q2_0 and TQ are for weights that were trained for them; IQ1 is the last resort.
CANDIDATES = (
    GgmlType.IQ1_S, GgmlType.IQ1_M, GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S, GgmlType.Q2_K, GgmlType.IQ3_XXS,
    GgmlType.IQ3_S, GgmlType.Q3_K, GgmlType.MXFP4, GgmlType.IQ4_XS, GgmlType.IQ4_NL, GgmlType.Q4_0, GgmlType.Q4_K,
    GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_K, GgmlType.Q5_1, GgmlType.Q6_K, GgmlType.Q8_0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Damages:
    """values: (tensor, type) → nats of KLD per predicted token.   importance: tensor → hash of what weighed it, or "".

    settings: what all values depend on; values of other settings are of no use.
    """

    values: Mapping[tuple[str, GgmlType], float]
    importance: Mapping[str, str]
    settings: Mapping[str, Json]


def measure_damages(
    checkpoint: Checkpoint,
    layout: GgufLayout,
    curvature: Curvature,
    importances: Importances | None = None,
    *,
    kinds: Sequence[GgmlType] = CANDIDATES,
    sample_elements: int = SAMPLE_ELEMENTS,
    earlier: Damages | None = None,
    threads: int = 1,
    library: Library | None = None,
    progress: Progress | None = None,
) -> Damages:
    """Damage of every tensor that can be quantised, in every type of `kinds` that fits it.

    Types that want importances are left out where there are none. Float32 weights, float64 sums.

    Args:
        sample_elements: weights of one tensor that are rounded; at least one row of every expert.
        earlier: values that need not be measured again, where settings and importances agree.
        threads: results do not depend on their number.
        progress: called with (tensors done, in all, label).
    Raises:
        UsageError: a tensor fits none of the types.
        CheckpointError: the curvature is of another model; a weight is not finite.
    """
    library = load() if library is None else library
    if curvature.model_fingerprint != checkpoint.fingerprint:
        raise CheckpointError(
            "the curvature is of another model",
            got=curvature.model_fingerprint[:12],
            wanted=checkpoint.fingerprint[:12],
            hint="make it from this checkpoint: after a cut, from the cut one",
        )
    settings: dict[str, Json] = {
        "model": checkpoint.fingerprint,
        "curvature": curvature.fingerprint,
        "quantiser": library.identity,
        "sample_elements": sample_elements,
    }
    old = earlier if earlier is not None and dict(earlier.settings) == settings else None
    columns = {tensor.name: tensor.shape[-1] for tensor in layout.tensors}
    values = {  # of padded experts some fit no more
        (name, kind): value
        for (name, kind), value in (old.values if old is not None else {}).items()
        if name not in columns or fits(kind, columns[name])
    }
    importance = {} if old is None else dict(old.importance)
    todo = [tensor for tensor in layout.tensors if quantisable(tensor)]
    buffers = Buffers()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done, tensor in enumerate(todo):
            given = _given(tensor, importances)
            digest = _digest(given)
            if importance.get(tensor.name) != digest:
                values = {key: value for key, value in values.items() if key[0] != tensor.name}
                importance[tensor.name] = digest
            wanted = [k for k in allowed(tensor, kinds, with_importances=bool(given)) if (tensor.name, k) not in values]
            if wanted:
                rows = _Rows.of(Source(checkpoint, tensor, buffers), _margins(curvature, tensor), sample_elements)
                found = pool.map(partial(rows.damage, given=given, library=library), wanted)
                for kind, total in zip(wanted, found, strict=True):
                    values[tensor.name, kind] = total / (2 * curvature.tokens)
            if progress is not None:
                progress(done + 1, len(todo), tensor.name)
    return Damages(values, importance, settings)


def allowed(tensor: GgufTensor, kinds: Sequence[GgmlType], *, with_importances: bool) -> list[GgmlType]:
    """Those of `kinds` whose blocks divide the tensor's rows, and that have the importances they want.

    Raises:
        UsageError: none.
    """
    found = [kind for kind in kinds if fits(kind, tensor.shape[-1])]
    if not with_importances:
        found = [kind for kind in found if not requires_imatrix(kind) and not wants_imatrix(tensor.name, kind)]
    if not found:
        names = ", ".join(kind.name for kind in kinds)
        raise UsageError("no type of the mix fits a tensor", where=tensor.name, got=names, hint="allow Q8_0")
    return found


# ---------------------------------------------------------------- one tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A sample of rows of each unit: float32 [n, F], with the curvature of its rows [n] and columns [F]."""

    name: str
    units: tuple[tuple[F32, F64, F64], ...]

    @classmethod
    def of(cls, source: Source, margins: Margins, elements: int) -> _Rows:
        count, (height, columns) = units(source.tensor), source.tensor.shape[-2:]
        take = min(height, max(1, elements // (count * columns)))
        at = np.unique(((np.arange(take) + 0.5) * height / take).astype(np.int64))
        parts = []
        for unit in range(count):
            values = np.empty((take, columns), np.float32)
            for first, stop in _runs(at):
                start = unit * height + int(at[first])
                values[first:stop] = source.load(Piece(start, start + stop - first)).values
            parts.append((values, margins.rows[unit, at], margins.columns[unit]))
        return cls(source.tensor.name, tuple(parts))

    def damage(self, kind: GgmlType, given: Sequence[F32], library: Library) -> float:
        """Σ_u Σ_ij rows·columns/total·(w − ŵ)², without the factor 1/(2N)."""
        total = 0.0
        for unit, (values, rows, columns) in enumerate(self.units):
            if not columns.any():
                continue
            raw = np.empty(tensor_bytes(kind, values.shape), np.uint8)
            quantise(values, kind, given[unit] if given else None, raw, name=self.name, library=library)
            error = dequantise(raw, kind, values.shape, library=library)
            error -= values
            np.square(error, out=error)
            each = error.astype(np.float64) @ columns
            weight = float(rows.sum())
            total += float(rows @ each) / weight if weight > 0 else float(each.mean())
        return total


def _runs(at: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[tuple[int, int]]:
    """Consecutive numbers as [first, stop) positions in `at`."""
    breaks = np.flatnonzero(np.diff(at) != 1) + 1
    edges = [0, *(int(b) for b in breaks), len(at)]
    return list(pairwise(edges))


def _margins(curvature: Curvature, tensor: GgufTensor) -> Margins:
    found = curvature.tensors.get(tensor.source or "")
    shape = tensor.shape
    if found is None:
        raise CheckpointError("the curvature lacks a tensor", where=tensor.source or tensor.name)
    if tensor.grown is not None:
        found = grow_margins(found, tensor.grown)
    if found.rows.shape != (units(tensor), shape[-2]) or found.columns.shape != (units(tensor), shape[-1]):
        got = f"{list(found.rows.shape)} and {list(found.columns.shape)}"
        raise CheckpointError("the curvature is of another model", where=tensor.name, got=got, wanted=list(shape))
    return found


def _given(tensor: GgufTensor, importances: Importances | None) -> list[F32]:
    """Importances of every unit; [] where the tensor has none."""
    if importances is None:
        return []
    found = [importances.importance(tensor.name, unit) for unit in range(units(tensor))]
    return [one for one in found if one is not None]


def _digest(given: Sequence[F32]) -> str:
    return blake3(b"".join(one.tobytes() for one in given)).hexdigest() if given else ""


# ---------------------------------------------------------------- the record


def save_damages(damages: Damages, path: Path) -> None:
    """Write one JSON file, over an older one."""
    tensors: dict[str, Json] = {}
    for name, digest in damages.importance.items():
        found: dict[str, Json] = {
            kind.name: value for (tensor, kind), value in damages.values.items() if tensor == name
        }
        tensors[name] = {"importance": digest, "damage": found}
    write_json(path, {"schema": DAMAGE_SCHEMA, "settings": dict(damages.settings), "tensors": tensors})


def load_damages(path: Path) -> Damages:
    """Read what `save_damages` wrote.

    Raises:
        UsageError: there is no such file.
        CheckpointError: another schema, unknown types, or damages that are no numbers.
    """
    f = open_record(path, "damages", DAMAGE_SCHEMA)
    settings = f.mapping("settings")
    values: dict[tuple[str, GgmlType], float] = {}
    importance: dict[str, str] = {}
    tensors = f.child("tensors")
    for name in tensors.names():
        one = tensors.child(name)
        importance[name] = one.text("importance")
        damage = one.child("damage")
        for kind in damage.names():
            if kind not in GgmlType.__members__:
                damage.refuse(kind, kind, "a tensor type")
            values[name, GgmlType[kind]] = value = damage.number(kind)
            if value < 0:
                damage.refuse(kind, value, "at least 0")
        one.done()
    f.done()
    return Damages(values, importance, settings)
