"""What the GGUF stages of a recipe would read, write, need and take; each file says how sure its size is.

The times of quantising come from a trial of every type on a few rows, done while the dry run asks.
"""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcut import exporting, gguf_stages, imatrices, machine, mixing, models, stages
from gemcut.checkpoint import Checkpoint
from gemcut.export.imatrix import presumed, wants_importance
from gemcut.export.layout import layout_of
from gemcut.export.mix import measure, overrides, padding, shapes
from gemcut.exporting import FileCost
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.library import Library, load
from gemcut.ggml.quantise import quantise
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.machine import Rates
from gemcut.preflight import (
    EFFICIENCY,
    KLD_EXTRA_BYTES,
    LIGHT_MEMORY_BYTES,
    LINEAR_SUMS_BYTES,
    SMALL_WRITE_BYTES,
    StageCost,
    active_parameters,
    observe_cost,
)
from gemcut.recipe import GgufWords, Measure, Recipe
from gemcut.vocabulary import size_bytes

if TYPE_CHECKING:
    from gemcut.stream.corpus import Corpus

_TRIAL_ROWS, _TRIAL_COLUMNS = 16, 1024


def gguf_costs(
    recipe: Recipe, base: Checkpoint, model: Checkpoint, corpus: Corpus, rates: Rates
) -> tuple[list[StageCost], tuple[FileCost, ...]]:
    """Costs of the stages behind a cut, and every file that they would write; of a solved one, the most it may weigh.

    Args:
        model: what is quantised; the base, or the base as a cut of that many units would leave it.
    Raises:
        UsageError: an unknown type or tier, or a size below the least possible (says it).
    """
    words = recipe.gguf
    assert words is not None
    library, layout = load(), layout_of(model)
    files = file_costs(model, layout, words, library)
    costs = []
    if words.imatrix is not None and (words.tiers or words.solves):
        costs.append(_imatrix(recipe, base, model, layout, corpus, rates))
    if words.solves:
        costs.append(_curvature(recipe, model, rates))
    threads = words.threads or machine.cores()
    read = sum(model.ref(tensor.source).size_bytes for tensor in layout.tensors if tensor.source is not None)
    write = sum(one.size_bytes for one in files)
    seconds = kernel_seconds(layout, files, library) / threads
    if words.solves:
        seconds += _measuring_seconds(layout, library) / threads
    if rates.read and rates.write:
        seconds = max(seconds, read / rates.read) + write / rates.write
    costs.append(StageCost("gguf", "", read, write + SMALL_WRITE_BYTES, LIGHT_MEMORY_BYTES, seconds))
    if recipe.kld is not None:
        costs.append(_kld(base, stages.corpus_of(recipe.kld, base), recipe.kld, files, rates))
    return costs, files


def file_costs(model: Checkpoint, layout: GgufLayout, words: GgufWords, library: Library) -> tuple[FileCost, ...]:
    """Every file; types are those that an importance matrix of the whole model would give."""
    importances, stand_in = words.imatrix, None
    if importances is not None:
        rounds = imatrices.words_of(importances.variant, importances.target, 0, (), importances.roundings).roundings
        stand_in = presumed(layout, variant=importances.variant, roundings=rounds)
    asked = exporting.GgufWords(
        words.tiers,
        None if stand_in is None else Path(gguf_stages.IMATRIX),
        words.overrides,
        None if words.max_shard_size is None else size_bytes(words.max_shard_size),
        pad_experts=words.pad_experts,
    )
    found, layout = exporting.presumed_costs(model, asked, library, stand_in)
    drafter_bytes = None
    if words.drafter is not None:
        drafter = models.open_exportable(words.drafter.model)
        exports = exporting.plan_export(drafter, exporting.GgufWords(words.drafter.tiers), library)
        beside = exporting.costs_of(exports)
        drafter_bytes = beside[0].size_bytes
        found += beside
    if words.mmproj:
        exports = exporting.plan_export(model, exporting.GgufWords((), projectors=words.mmproj), library)
        found += exporting.costs_of(exports)
    mix = mixing.MixWords(gguf_stages.sizes(words), gguf_stages.cards(model, words, drafter_bytes))
    if not mix.asked:
        return tuple(found)
    header_bytes = exporting.presumed_header_bytes(model, layout, asked, library, stand_in)
    fixed = overrides.decided(layout, overrides.parse_overrides(words.overrides))
    budgets = mixing.budgets_of(layout, mix)
    _, most = mixing.solvable(layout, budgets, header_bytes, stand_in, fixed)
    suffix = padding.SUFFIX if words.pad_experts else ""
    for one in budgets:
        size = min(one.size_bytes, most)
        bits = 8 * size / sum(tensor.weights for tensor in layout.tensors)
        file = f"{exporting.file_stem(model)}-{one.name}{suffix}.gguf"
        found.append(FileCost(file, 1, size, bits, (), "at most"))
    return tuple(found)


def kernel_seconds(layout: GgufLayout, files: tuple[FileCost, ...], library: Library) -> float:
    """Processor seconds inside the quantisers for these files, from a trial of each type."""
    rates: dict[GgmlType, float] = {}
    total = 0.0
    for file in files:
        for kind_size in file.kinds:
            share = kind_size.elements / max(len(kind_size.types), 1)
            for kind in kind_size.types:
                if kind not in rates:
                    rates[kind] = seconds_per_weight(kind, library)
                total += share * rates[kind]
    return total


def seconds_per_weight(kind: GgmlType, library: Library) -> float:
    """Of one type on one core, now: the best of two trials on 16 × 1024 random weights."""
    if kind in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        return 0.0
    values = np.random.default_rng(0).standard_normal((_TRIAL_ROWS, _TRIAL_COLUMNS)).astype(np.float32)
    importance = np.ones(_TRIAL_COLUMNS, np.float32)
    out = np.empty(tensor_bytes(kind, values.shape), np.uint8)
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        quantise(values, kind, importance, out, library=library)
        best = min(best, time.perf_counter() - began)
    return best / values.size


def _measuring_seconds(layout: GgufLayout, library: Library) -> float:
    """Every type of every tensor on a sample of its rows: what a solved size costs before it is solved."""
    sampled = sum(
        min(prod(tensor.shape), measure.SAMPLE_ELEMENTS) for tensor in layout.tensors if shapes.quantisable(tensor)
    )
    return sampled * sum(seconds_per_weight(kind, library) for kind in measure.CANDIDATES)


def _imatrix(
    recipe: Recipe, base: Checkpoint, model: Checkpoint, layout: GgufLayout, corpus: Corpus, rates: Rates
) -> StageCost:
    """The importances, and after a cut the observation of the cut model before them."""
    words = recipe.gguf
    assert words is not None
    assert words.imatrix is not None
    tensors = [tensor for tensor in layout.tensors if wants_importance(tensor)]
    columns = sum((t.shape[0] if len(t.shape) == 3 else 1) * t.shape[-1] for t in tensors)
    looks = model.size_bytes if words.imatrix.variant in ("hybrid", "auto") else 0
    read, write, memory, seconds = columns * LINEAR_SUMS_BYTES + looks, columns * 4 + SMALL_WRITE_BYTES, 0, None
    if model is not base:
        again = observe_cost(base, corpus, recipe.observe, rates)
        read, write, memory, seconds = (
            read + again.read_bytes,
            write + again.write_bytes,
            again.memory_bytes,
            again.seconds,
        )
    return StageCost("imatrix", "", read, write, max(memory, LIGHT_MEMORY_BYTES), seconds)


def _curvature(recipe: Recipe, model: Checkpoint, rates: Rates) -> StageCost:
    from gemcut.ablate import AblateSettings, curvature_bytes

    assert recipe.gguf is not None
    words = recipe.gguf.curvature
    text = stages.corpus_of(words, model, recipe.observe.corpus)
    settings = AblateSettings(device=words.device, dtype=None if words.dtype == "auto" else words.dtype)
    layer = max((ref.size_bytes for ref in model.tensors.values()), default=0) * 8  # weights, gradients, squares
    compute = 4 * 2 * active_parameters(model) * text.tokens / (rates.flops * EFFICIENCY)
    memory = curvature_bytes(model, text, settings) + layer + KLD_EXTRA_BYTES
    return StageCost("curvature", "", 2 * model.size_bytes, SMALL_WRITE_BYTES, memory, compute)


def _kld(base: Checkpoint, text: Corpus, words: Measure, files: tuple[FileCost, ...], rates: Rates) -> StageCost:
    """The base in transformers, the files in llama.cpp; both multiply each active parameter once."""
    models_only = [one for one in files if not one.name.startswith("mmproj-")]
    candidates = len(models_only) + words.floor
    compute = 2 * active_parameters(base) * text.tokens * (1 + candidates) / (rates.flops * EFFICIENCY)
    scratch = 2 * sum(ref.elements for ref in base.tensors.values()) if words.floor else 0
    read = base.size_bytes + sum(one.size_bytes for one in models_only) + scratch
    largest = max((one.size_bytes for one in models_only), default=0)
    hidden = text.tokens * int(str(base.text_config.get("hidden_size", 0))) * 4
    memory = largest + hidden + KLD_EXTRA_BYTES
    return StageCost("kld", "", read, SMALL_WRITE_BYTES + scratch, memory, compute)
