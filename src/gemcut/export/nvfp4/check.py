"""An NVFP4 folder held against its base, by structure and by numbers, with nothing of what wrote it. numpy only.

Every matrix is quantised or as it was; names, dtypes and shapes fit; scales are finite, plausible and shared where
servers fuse; each matrix reads back close to the base's; the ignore list means under vLLM's rules what the tensors say;
config.json is the base's but for its quantization_config; everything else is the base's, byte for byte.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from gemcut.checkpoint import Checkpoint, VerifyReport, diff, verify
from gemcut.checkpoint.diff import config_changes
from gemcut.checkpoint.folder import MANIFEST, RECORDS, SUMS, list_files, parse_sums
from gemcut.checkpoint.read import INDEX, Progress
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError
from gemcut.export.nvfp4.record import CONVERTED, RECORD
from gemcut.export.nvfp4.served import check_served
from gemcut.families.linears import LinearGroup, Matrix
from gemcut.nvfp4.choices import Layout, Scheme
from gemcut.nvfp4.decode import E4M3, dequantise
from gemcut.nvfp4.layout import HEADS_KEY, NAMES, QUANTIZATION, Told, cache_tensors, read_config, tensors_of
from gemcut.nvfp4.plain import divisor
from gemcut.store import read_json, sha256_file
from gemcut.types import DTYPE_BYTES, F64, TensorRef

MAX_RELATIVE_ERROR = 0.12  # rounding bell-shaped weights loses 0.08 to 0.096; a swapped nibble or a lost scale far more
_RANGE = 448.0 * 6.0
_SCALE_TOLERANCE = 0.01
_LEAST_LARGEST_SCALE = 300.0  # of a group: its largest weight's block is near 448, though a sweep may go below
_INPUT_SCALES = (1e-2, 1e6)
_MEDIAN_FACTOR = 100.0
_CACHE_SCALES = (1e-5, 10.0)
_TILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Nvfp4Verified:
    """What was checked; the existence of this means that all of it agreed.

    relative_error: mean over matrices of ‖w' − w‖ / ‖w‖.   worst: the largest, with its module.
    bits_per_weight: of the quantised matrices.
    """

    scheme: Scheme
    layout: Layout
    modules: int
    relative_error: float
    worst: tuple[str, float]
    bits_per_weight: float
    size_ratio: float
    cache: bool
    untouched: int  # tensors that are the base's, byte for byte
    verified: VerifyReport


def verify_nvfp4(
    out: Checkpoint,
    base: Checkpoint,
    *,
    max_error: float = MAX_RELATIVE_ERROR,
    progress: Progress | None = None,
) -> Nvfp4Verified:
    """Check everything; a matrix in memory a tile at a time.

    Raises:
        CheckpointError: anything disagrees; the message names the first tensor.
    """
    told = read_config(out.config, out.name)
    groups = base.family.linears().groups(base.text_config, {name: ref.shape for name, ref in base.tensors.items()})
    packed = NAMES[told.layout].packed
    quantised = {
        matrix.module
        for group in groups
        for matrix in group.matrices
        if (ref := out.tensors.get(matrix.module + packed)) is not None and ref.dtype == "U8"
    }
    chosen = _whole_groups(groups, quantised)
    _check_tensors(out, base, told, chosen)
    _check_served(base, told, groups, quantised)
    _check_config(out, base)
    _check_inputs(out, told, chosen)
    if told.cache:
        _check_cache(out, base, told)
    errors = _errors(out, base, told, chosen, max_error, progress)
    report = _bytes(out, base, progress)
    gone = {matrix.tensor for group in chosen for matrix in group.matrices}
    same = 0
    for fact in report.manifest.tensors:
        if fact.found not in ("added", "removed") and fact.name not in gone:
            same += fact.found == "same"
            if fact.found != "same":
                _refuse("a tensor that is not quantised is not the base's", fact.name, got=fact.found, wanted="same")
    worst = max(errors, key=lambda name: errors[name])
    weights = sum(m.rows * m.columns for group in chosen for m in group.matrices)
    stored = sum(
        DTYPE_BYTES[ref.dtype] * ref.elements
        for group in chosen
        for matrix in group.matrices
        for ref in tensors_of(matrix, told.layout, told.scheme)
    )
    return Nvfp4Verified(
        scheme=told.scheme,
        layout=told.layout,
        modules=len(errors),
        relative_error=math.fsum(errors.values()) / len(errors),
        worst=(worst, errors[worst]),
        bits_per_weight=8 * stored / weights,
        size_ratio=out.size_bytes / base.size_bytes,
        cache=told.cache,
        untouched=same,
        verified=report,
    )


def _refuse(what: str, where: str, *, got: object = None, wanted: object = None, hint: str | None = None) -> NoReturn:
    raise CheckpointError(what, where=where, got=got, wanted=wanted, hint=hint)


def _whole_groups(groups: Sequence[LinearGroup], quantised: Collection[str]) -> list[LinearGroup]:
    chosen = []
    for group in groups:
        there = [matrix.module in quantised for matrix in group.matrices]
        if any(there) and not all(there):
            missing = next(matrix.module for matrix in group.matrices if matrix.module not in quantised)
            _refuse("what servers fuse is quantised in part", missing, wanted="all of them, or none")
        if all(there):
            chosen.append(group)
    if not chosen:
        _refuse("the checkpoint has no NVFP4 tensor", "the folder's tensors")
    return chosen


def _check_tensors(out: Checkpoint, base: Checkpoint, told: Told, chosen: Sequence[LinearGroup]) -> None:
    """Names, dtypes and shapes of everything, and nothing besides."""
    gone = {matrix.tensor for group in chosen for matrix in group.matrices}
    wanted = {name: ref for name, ref in base.tensors.items() if name not in gone}
    for group in chosen:
        for matrix in group.matrices:
            wanted |= {ref.name: ref for ref in tensors_of(matrix, told.layout, told.scheme)}
    if told.cache:
        wanted |= {ref.name: ref for ref in _cache(base, told.layout)}
    for name, ref in wanted.items():
        found = out.tensors.get(name)
        if found is None:
            _refuse("a tensor is missing", name, wanted=f"{ref.dtype} {list(ref.shape)}")
        if (found.dtype, found.shape) != (ref.dtype, ref.shape):
            _refuse(
                "a tensor has another form", name,
                got=f"{found.dtype} {list(found.shape)}", wanted=f"{ref.dtype} {list(ref.shape)}",
            )  # fmt: skip
    if strange := out.tensors.keys() - wanted.keys():
        _refuse("a tensor belongs to nothing", min(strange))


def _cache(base: Checkpoint, layout: Layout) -> list[TensorRef]:
    prefixes = [base.family.layer_prefix(base.tensors, layer) for layer in sorted({site.layer for site in base.sites})]
    return [ref for prefix in prefixes for ref in cache_tensors(f"{prefix}self_attn", layout)]


def _check_served(base: Checkpoint, told: Told, groups: Sequence[LinearGroup], quantised: Collection[str]) -> None:
    inside = {matrix.tensor for group in groups for matrix in group.matrices}
    others = [
        name.removesuffix(".weight")
        for name, ref in base.tensors.items()
        if name.endswith(".weight") and len(ref.shape) > 1 and name not in inside
    ]
    ignore = told.ignore
    if told.layout == "modelopt":
        ignore = tuple("re:" + fnmatch.translate(one) for one in ignore)
    check_served(ignore, groups, quantised, [*others, "lm_head"], base.family.linears())


def _bytes(out: Checkpoint, base: Checkpoint, progress: Progress | None) -> VerifyReport:
    """Every byte against base and record. A converted folder's record speaks of the folder that it was converted from:
    of it only the hashes of files count."""
    record = out.path / RECORD
    if not record.is_file() or CONVERTED not in read_json(record, "record of an NVFP4 export"):
        return verify(out, base, progress=progress)
    manifest = diff(base, out, progress=progress)
    sums = parse_sums((out.path / SUMS).read_bytes()) if (out.path / SUMS).is_file() else {}
    actual = {**manifest.files, MANIFEST: sha256_file(out.path / MANIFEST)} if sums else manifest.files
    if wrong := [name for name, digest in sums.items() if actual.get(name) != digest]:
        _refuse("files are not what the record says", min(wrong), hint="convert again")
    changed = sum(fact.found != "same" for fact in manifest.tensors)
    return VerifyReport(manifest, changed, (), False, bool(sums), len(manifest.files), ())


def _check_config(out: Checkpoint, base: Checkpoint) -> None:
    plain = {key: value for key, value in out.config.items() if key != QUANTIZATION}
    changes = {
        key: change for key, change in config_changes(base.config, plain).items() if key.rpartition(".")[2] != HEADS_KEY
    }
    if changes:
        key, (before, after) = next(iter(changes.items()))
        _refuse("config.json is not the base's", key, got=after, wanted=before)
    metadata = (out.index or {}).get("metadata")
    if isinstance(metadata, dict) and metadata.get("total_size", out.size_bytes) != out.size_bytes:
        _refuse("the index's total_size is wrong", INDEX, got=metadata["total_size"], wanted=out.size_bytes)
    weights = {*base.shards, INDEX}
    missing = {name for name in list_files(base.path) if name not in weights} - set(list_files(out.path)) - set(RECORDS)
    if missing:
        _refuse("a file of the base is missing", min(missing), hint="tokenizer and templates belong to the model")


def _check_inputs(out: Checkpoint, told: Told, chosen: Sequence[LinearGroup]) -> None:
    """Scales of activations: one for what is fused, in a plausible range, near their layer's peers."""
    if told.scheme != "NVFP4":
        return
    ends = NAMES[told.layout]
    by_place: dict[tuple[int, str], dict[str, float]] = {}
    for group in chosen:
        values = {m.module: divisor(out, out.ref(m.module + ends.inputs), told.layout) for m in group.matrices}
        if len(set(values.values())) > 1:
            _refuse(
                "what servers fuse has different scales of its inputs", next(iter(values)), got=list(values.values())
            )
        by_place.setdefault((group.layer, group.input), {}).update(values)
    for found in by_place.values():
        middle = float(np.median(list(found.values())))
        for module, value in found.items():
            if not _INPUT_SCALES[0] <= value <= _INPUT_SCALES[1]:
                _refuse("a scale of inputs is not plausible", module, got=value, wanted=f"{_INPUT_SCALES}")
            if not middle / _MEDIAN_FACTOR <= value <= middle * _MEDIAN_FACTOR:
                _refuse("a scale of inputs is far from its layer's", module, got=value, wanted=f"near {middle:g}")


def _check_cache(out: Checkpoint, base: Checkpoint, told: Told) -> None:
    for ref in _cache(base, told.layout):
        found = decode(ref.dtype, out.read(ref.name))
        if found is None or not _CACHE_SCALES[0] < float(found[0]) < _CACHE_SCALES[1]:
            _refuse(
                "a scale of the cache is not plausible", ref.name,
                got=None if found is None else float(found[0]), wanted=f"{_CACHE_SCALES}",
            )  # fmt: skip


def _errors(
    out: Checkpoint,
    base: Checkpoint,
    told: Told,
    chosen: Sequence[LinearGroup],
    max_error: float,
    progress: Progress | None,
) -> dict[str, float]:
    """‖w' − w‖ / ‖w‖ of every matrix; and every group's scale against its largest weight."""
    errors: dict[str, float] = {}
    ends = NAMES[told.layout]
    for done, group in enumerate(chosen):
        scales = [divisor(out, out.ref(m.module + ends.scale), told.layout) for m in group.matrices]
        if len(set(scales)) > 1:
            _refuse("what servers fuse has different global scales", group.matrices[0].module, got=scales)
        largest, largest_scale = 0.0, 0.0
        for matrix in group.matrices:
            error, peak, step = _one(out, base, told, matrix, scales[0])
            largest, largest_scale = max(largest, peak), max(largest_scale, step)
            errors[matrix.module] = error
            if error > max_error:
                _refuse(
                    "a matrix reads back unlike the base's", matrix.module, got=f"relative error {error:.3f}",
                    wanted=f"at most {max_error}", hint="packing or scales are wrong, or the weights are unlike others",
                )  # fmt: skip
        if largest > 0 and abs(scales[0] * largest / _RANGE - 1) > _SCALE_TOLERANCE:
            _refuse(
                "a global scale does not fit its weights", group.matrices[0].module,
                got=scales[0], wanted=f"2688 / {largest:g} = {_RANGE / largest:g}",
            )  # fmt: skip
        if largest > 0 and largest_scale < _LEAST_LARGEST_SCALE:
            _refuse("no block's scale is near the largest", group.matrices[0].module, got=largest_scale, wanted="448")
        if progress is not None:
            progress(done + 1, len(chosen), "reading back")
    return errors


def _one(out: Checkpoint, base: Checkpoint, told: Told, matrix: Matrix, scale: float) -> tuple[float, float, float]:
    """Relative error, largest |w| and largest block scale of one matrix, in tiles of rows; sums in float64."""
    names = NAMES[told.layout]
    columns, dtype = matrix.columns, base.ref(matrix.tensor).dtype
    row = columns * DTYPE_BYTES[dtype]
    step = max(1, _TILE // columns)
    error = norm = peak = largest = 0.0
    for first in range(0, matrix.rows, step):
        stop = min(first + step, matrix.rows)
        raw = base.read_range(matrix.tensor, (matrix.first + first) * row, (matrix.first + stop) * row)
        plain: F64 | None = decode(dtype, raw)
        assert plain is not None  # the encoder takes floats alone, and the shapes agree
        codes = out.read_range(matrix.module + names.packed, first * columns // 2, stop * columns // 2)
        scales = out.read_range(matrix.module + names.scales, first * columns // 16, stop * columns // 16)
        steps = E4M3[scales]
        if not np.isfinite(steps).all() or (steps < 0).any():
            _refuse("a block's scale is NaN or negative", matrix.module + names.scales)
        back = dequantise(codes.reshape(stop - first, -1), scales.reshape(stop - first, -1), scale).reshape(-1)
        if back.reshape(-1, 16)[~plain.reshape(-1, 16).any(1)].any():
            _refuse("a block of zeros reads back as something else", matrix.module)
        change = back - plain
        error += float(np.dot(change, change))
        norm += float(np.dot(plain, plain))
        peak = max(peak, float(np.abs(plain).max(initial=0.0)))
        largest = max(largest, float(steps.max(initial=0.0)))
    relative = math.sqrt(error / norm) if norm > 0 else (math.inf if error > 0 else 0.0)
    return relative, peak, largest
