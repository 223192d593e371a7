"""An NVFP4 checkpoint from a checkpoint: everything decided and refused first, then written in one streamed pass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemcut import machine
from gemcut.checkpoint import Checkpoint, write_checkpoint
from gemcut.checkpoint.made import Made
from gemcut.checkpoint.read import Progress
from gemcut.checkpoint.write import lay_out_shards
from gemcut.errors import UsageError
from gemcut.export.nvfp4.activations import Observed, gate, observed
from gemcut.export.nvfp4.cache import cache_scales
from gemcut.export.nvfp4.choice import Choice, choose, exclude_wildcards
from gemcut.export.nvfp4.quantise import Quantiser
from gemcut.export.nvfp4.record import RECORD, Origin, record_json
from gemcut.export.nvfp4.served import check_served
from gemcut.nvfp4.choices import MAX_BORROWED, ActivationRule, KvCache, Layout, Method, Narrow, Scheme, Targets
from gemcut.nvfp4.layout import HF_QUANT, RECIPE, config_with, hf_quant_config, recipe_text, refuse_quantised
from gemcut.records import StatisticsIndex, load_index_of
from gemcut.store import free_bytes, need_disk
from gemcut.stream.devices import check_device
from gemcut.types import Edits, Json, Manifest, Omit

_BASE_MEMORY_BYTES = 600 << 20  # torch, buffers and the hashing threads
_RECORD_BYTES = 400  # of one module in nvfp4.json and manifest.json


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked for.

    scales: "" for the best that can be had: weighted with statistics, sweep without.   max_borrowed: share of a layer's
    experts that may have their peers' activation scales.
    """

    scheme: Scheme
    targets: Targets = "mlp+experts"
    scales: Method | Literal[""] = ""
    layout: Layout = "compressed-tensors"
    activations: ActivationRule = "max"
    kv: KvCache = "none"
    ignore: tuple[str, ...] = ()
    narrow: Narrow = "keep"
    device: str = "cpu"
    max_borrowed: float = MAX_BORROWED
    threads: int = 1


@dataclass(frozen=True, slots=True)
class PartSize:
    """Matrices of one part of the decoder: before, and after."""

    part: str
    modules: int
    parameters: int
    size_bytes_before: int
    size_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An export that nothing stands in the way of.   sizes: to the byte; `size_bytes` of the shards."""

    checkpoint: Checkpoint
    settings: Settings
    choice: Choice
    statistics: StatisticsIndex | None  # None where nothing was taken from them
    borrowed: tuple[str, ...]
    quantiser: Quantiser
    edits: Edits
    made: Mapping[str, Made]
    config: Mapping[str, Json]
    ignore: tuple[str, ...]
    parts: tuple[PartSize, ...]
    size_bytes_before: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Nvfp4Report:
    """What was written.   relative_error: mean over modules, and the largest with its module."""

    scheme: Scheme
    layout: Layout
    scales: Method
    modules: int
    size_bytes_before: int
    size_bytes: int
    relative_error: float
    worst: tuple[str, float]
    borrowed: tuple[str, ...]
    left: Mapping[str, str]
    manifest: Manifest


def prepare(checkpoint: Checkpoint, settings: Settings, statistics: Path | None = None) -> Prepared:
    """Decide and refuse; reads headers, statistics and, for the cache's bound, norms.

    Raises:
        UsageError: quantised already; scales that need statistics without them; see `choice.choose`.
        CheckpointError: statistics of another model.
        QualityError: the statistics cover too little of the model.
        MissingError: the device is not here.
    """
    refuse_quantised(checkpoint.config, checkpoint.name)
    _ = checkpoint.sites  # every shape that the family relies on
    check_device(settings.device)
    method: Method = settings.scales or ("sweep" if statistics is None else "weighted")
    of_inputs = settings.scheme == "NVFP4" or method == "weighted"
    if statistics is None and of_inputs:
        what = (
            "NVFP4 has a scale for the inputs of every linear" if method != "weighted" else "scales are to be weighted"
        )
        raise UsageError(
            f"{what}, which only statistics can tell",
            where="--stats",
            hint="gemcut observe MODEL --corpus … -o STATS, then --stats STATS; or --scheme NVFP4A16 --scales sweep",
        )
    choice = choose(checkpoint, settings.targets, settings.ignore, narrow=settings.narrow)
    linears = checkpoint.family.linears()
    found: Observed | None = None
    borrowed: tuple[str, ...] = ()
    index: StatisticsIndex | None = None
    if statistics is not None and (of_inputs or settings.kv == "calibrated"):
        index = load_index_of(statistics, checkpoint.fingerprint)
    if statistics is not None and of_inputs:
        found = observed(statistics, checkpoint, settings.activations, max_borrowed=settings.max_borrowed)
        borrowers = gate(found, choice.chosen)
        borrowed = tuple(
            matrix.module
            for group in choice.chosen
            if (group.input, group.unit) in borrowers.get(group.layer, ())
            for matrix in group.matrices
        )
    ignore = choice.ignore
    modules = [matrix.module for group in choice.chosen for matrix in group.matrices]
    check_served(ignore, choice.all, modules, other_linears(checkpoint, choice), linears)
    if settings.layout == "modelopt":
        ignore = exclude_wildcards(checkpoint, choice.all, choice.chosen, linears)
    quantiser = Quantiser(
        checkpoint, settings.scheme, settings.layout, method, found, choice.chosen, settings.device, settings.threads
    )
    made = {name: quantiser.made(name, groups) for name, groups in choice.tensors.items()}
    edits = {name: Omit() for name in made}
    made |= cache_scales(checkpoint, settings.kv, settings.layout, statistics)
    config = config_with(checkpoint.config, settings.scheme, settings.layout, ignore, kv=settings.kv != "none")
    size = sum(shard.header.size_bytes for shard in lay_out_shards(checkpoint, edits, made))
    return Prepared(
        checkpoint, settings, choice, index, borrowed, quantiser, edits, made, config, ignore,
        _parts(choice, checkpoint, made), sum(h.size_bytes for h in checkpoint.shards.values()), size,
    )  # fmt: skip


def write_nvfp4(
    prepared: Prepared, out: Path, *, force: bool = False, link: bool = True, progress: Progress | None = None
) -> Nvfp4Report:
    """Write the folder; it appears whole or not at all, and a killed run starts again.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        UsageError, MissingError: see `write_checkpoint`.
    """
    base, settings, quantiser = prepared.checkpoint, prepared.settings, prepared.quantiser
    quantiser.facts.clear()
    with quantiser.working():
        report = write_checkpoint(
            base, prepared.edits, prepared.config, out,
            force=force, link=link, made=prepared.made, files=lambda: _files(prepared), progress=progress,
        )  # fmt: skip
    errors = {name: fact.relative_error for name, fact in quantiser.facts.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Nvfp4Report(
        scheme=settings.scheme,
        layout=settings.layout,
        scales=quantiser.method,
        modules=len(errors),
        size_bytes_before=prepared.size_bytes_before,
        size_bytes=prepared.size_bytes,
        relative_error=math.fsum(errors.values()) / len(errors),
        worst=(worst, errors[worst]),
        borrowed=prepared.borrowed,
        left=prepared.choice.left,
        manifest=report.manifest,
    )


@dataclass(frozen=True, slots=True)
class Nvfp4Preflight:
    """What an export would read, write and need. Sizes are exact, the record excepted."""

    scheme: Scheme
    scales: Method
    parts: tuple[PartSize, ...]
    size_bytes_before: int
    size_bytes: int
    write_bytes: int
    free_bytes: int
    memory_bytes: int
    available_bytes: int


def estimate(prepared: Prepared, out: Path) -> Nvfp4Preflight:
    """Costs, and a refusal of what cannot finish.

    Raises:
        MissingError: the disk is too small.
    """
    modules = sum(part.modules for part in prepared.parts)
    largest = max(matrix.rows * matrix.columns for group in prepared.choice.chosen for matrix in group.matrices)
    write = prepared.size_bytes + modules * _RECORD_BYTES
    need_disk(out, write)
    return Nvfp4Preflight(
        prepared.settings.scheme, prepared.quantiser.method, prepared.parts, prepared.size_bytes_before,
        prepared.size_bytes, write, free_bytes(out), _BASE_MEMORY_BYTES + largest // 16 + modules * 4 * _RECORD_BYTES,
        machine.available_bytes(),
    )  # fmt: skip


def other_linears(checkpoint: Checkpoint, choice: Choice) -> list[str]:
    """Modules outside the decoder's matrices that may be linears: every weight with two axes or more, and the head."""
    inside = {matrix.tensor for group in choice.all for matrix in group.matrices}
    weights = [
        name.removesuffix(".weight")
        for name, ref in checkpoint.tensors.items()
        if name.endswith(".weight") and len(ref.shape) > 1 and name not in inside
    ]
    return [*weights, "lm_head"]


def _files(prepared: Prepared) -> dict[str, bytes]:
    """What lies beside the weights; called when every module is done."""
    settings, quantiser = prepared.settings, prepared.quantiser
    index = prepared.statistics
    origin = Origin(
        parent=prepared.checkpoint.fingerprint,
        scheme=settings.scheme,
        layout=settings.layout,
        targets=settings.targets,
        scales=quantiser.method,
        activations=settings.activations if settings.scheme == "NVFP4" else "",
        kv=settings.kv,
        statistics="" if index is None else index.fingerprint,
        corpus="" if index is None else index.meta.corpus_hash,
    )
    modules = {
        name: {"scale": one.scale, "input_scale": one.input_scale, "relative_error": one.relative_error}
        for name, one in sorted(quantiser.facts.items())
    }
    record = record_json(origin, modules, prepared.choice.left, prepared.borrowed, prepared.ignore)
    kv = settings.kv != "none"
    files = {
        RECORD: _json(record),
        RECIPE: recipe_text(settings.scheme, prepared.choice.ignore, kv=kv).encode(),
    }
    if settings.layout == "modelopt":
        files[HF_QUANT] = _json(hf_quant_config(settings.scheme, prepared.ignore, kv=kv))
    return files


def _json(value: Mapping[str, Json]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _parts(choice: Choice, checkpoint: Checkpoint, made: Mapping[str, Made]) -> tuple[PartSize, ...]:
    out = []
    for part in dict.fromkeys(group.part for group in choice.chosen):
        mine = [group for group in choice.chosen if group.part == part]
        names = dict.fromkeys(matrix.tensor for group in mine for matrix in group.matrices)
        out.append(
            PartSize(
                part,
                sum(len(group.matrices) for group in mine),
                sum(matrix.rows * matrix.columns for group in mine for matrix in group.matrices),
                sum(checkpoint.ref(name).size_bytes for name in names),
                sum(made[name].size_bytes for name in names),
            )
        )
    return tuple(out)
