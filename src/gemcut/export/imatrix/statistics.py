"""From the sums of a streamed pass to an importance matrix: no second pass, one layer's file at a time."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.imatrix.entries import Entry, Imatrix, Inputs, Variant, entry_of, wants_importance
from gemcut.export.imatrix.starved import PRIOR_TOKENS
from gemcut.export.imatrix.variants import Moments, formula, importance, moments
from gemcut.export.imatrix.weights import column_energy, units_of
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.records.linears import LinearSums, load_linears
from gemcut.records.statistics import StatisticsIndex, load_statistics_index

log = logging.getLogger(__name__)

CHUNK_SIZE = 512  # tokens: what llama.cpp's tools count in, unless told otherwise
BOTH = (0, 1)


def from_statistics(
    folder: Path,
    layout: GgufLayout,
    *,
    variant: Variant = "plain",
    chosen: Mapping[str, str] | None = None,
    roundings: int = 1,
    rounded: Container[str] | None = None,
    checkpoint: Checkpoint | None = None,
    prior: int = PRIOR_TOKENS,
) -> Imatrix:
    """The importance matrix of an observation, with the names and shapes of the model's GGUF file.

    `plain`: sums Σa², counts n. Any other variant: sums s·n, counts n, so that sums / counts is the importance s.
    Experts below a fifth of their layer's mean count borrow `prior` rows of that mean; 0 leaves them as they are.

    Args:
        chosen: formula by tensor name, for `auto`; tensors that it does not name are plain.
        roundings: of how many quantisations our exporter picks each block (`blocks`); 1: of one, as llama-quantize.
        rounded: tensors whose blocks are picked; None: all.
        checkpoint: the observed model; only formulas that look at weights need it.

    Raises:
        UsageError: no such folder, an unknown variant, or a variant that needs the model.
        CheckpointError: damaged statistics, or statistics of another model than the layout's.
    """
    index = load_statistics_index(folder)
    entries: dict[str, Entry] = {}
    starved: dict[str, tuple[int, ...]] = {}
    inputs: dict[str, Inputs] = {}
    for tensor, sums in observed(folder, index, layout):
        found = moments(sums, BOTH, prior)
        name = variant if variant != "auto" else (chosen or {}).get(tensor.name, "plain")
        energy = None
        if formula(name).weights:
            if checkpoint is None:
                raise UsageError(f"variant {name!r} looks at the weights", wanted="the observed model", hint="--model")
            energy = column_energy(checkpoint, tensor)
        n = found.n[:, None]
        entries[tensor.name] = entry_of(importance(name, found, energy) * n, found.n)
        if roundings > 1 and (rounded is None or tensor.name in rounded):
            inputs[tensor.name] = _inputs(found, tensor.name)
        if found.starved:
            starved[tensor.name] = found.starved
    meta = index.meta
    return Imatrix(
        entries=entries,
        datasets=(_dataset(meta.corpus_hash),),
        chunks=max(1, meta.tokens // CHUNK_SIZE),
        chunk_size=CHUNK_SIZE,
        variant=variant,
        prior_tokens=prior,
        starved=starved,
        roundings=roundings,
        inputs=inputs,
        model_fingerprint=meta.model_fingerprint,
        corpus_hash=meta.corpus_hash,
    )


def presumed(layout: GgufLayout, *, variant: Variant = "plain", roundings: int = 1) -> Imatrix:
    """An importance matrix as `from_statistics` will make it, before there are statistics: it fills as many bytes of a
    file's header, and asks as much of its types; what it says of columns and layers is nobody's measurement."""
    wanted = [tensor for tensor in layout.tensors if wants_importance(tensor)]
    entries = {}
    for tensor in wanted:
        assert tensor.layer is not None
        units = tensor.shape[0] if len(tensor.shape) == 3 else 1
        # no line through the layers, which says nothing of them
        sums = np.full((units, tensor.shape[-1]), np.exp((tensor.layer / layout.layers) ** 2))
        entries[tensor.name] = entry_of(sums, np.ones(units))
    return Imatrix(
        entries=entries,
        datasets=(_dataset("0" * 64),),
        chunks=1,
        chunk_size=CHUNK_SIZE,
        variant=variant,
        roundings=roundings,
        corpus_hash="0" * 64,
    )


def _dataset(corpus_hash: str) -> str:
    return f"corpus {corpus_hash[:16]}"


def _inputs(found: Moments, name: str) -> Inputs:
    parts = found.inputs
    if parts is None:
        raise UsageError(
            "the statistics hold no means of inputs, by which blocks are picked",
            where=name,
            hint="observe again with this version, or --roundings 1",
        )
    return Inputs(*(part.astype(np.float32) for part in parts))


def observed(folder: Path, index: StatisticsIndex, layout: GgufLayout) -> Iterator[tuple[GgufTensor, LinearSums]]:
    """Every tensor of the layout that rows of activations enter, with its sums; one layer's file in memory.

    Tensors whose input was not observed are left out, with a warning: `coverage` lists them.

    Raises:
        CheckpointError: the sums have another width or number of experts than the tensor, or none fits at all.
    """
    by_layer: dict[int, list[GgufTensor]] = {}
    for tensor in layout.tensors:
        if wants_importance(tensor):
            assert tensor.layer is not None
            by_layer.setdefault(tensor.layer, []).append(tensor)
    there = {one.layer for one in index.layers}
    if odd := sorted(by_layer.keys() ^ there):
        raise CheckpointError(
            "the statistics are of another model: the numbers of layers differ",
            where=f"layer {odd[0]}",
            got=f"{len(there)} layers observed",
            wanted=f"{len(by_layer)}",
        )
    for layer in sorted(by_layer):
        sums = load_linears(folder, index, layer)
        if odd_modules := sorted(sums.keys() - {_module(tensor, layer) for tensor in by_layer[layer]}):
            raise CheckpointError(
                "the statistics are of another model: they hold a linear that this one has not",
                where=f"layer {layer}, {odd_modules[0]}",
            )
        for tensor in by_layer[layer]:
            found = sums.get(_module(tensor, layer))
            if found is None:
                log.warning("no activations were observed for %s", tensor.name)
                continue
            if found.columns != tensor.shape[-1] or found.a2.shape[1] != units_of(tensor):
                raise CheckpointError(
                    "the statistics are of another model: a linear has another shape",
                    where=f"{tensor.name}, {tensor.source}",
                    got=f"{found.a2.shape[1]} × {found.columns}",
                    wanted=f"{units_of(tensor)} × {tensor.shape[-1]}",
                )
            yield tensor, found


def _module(tensor: GgufTensor, layer: int) -> str:
    """`model.layers.3.self_attn.q_proj.weight` of layer 3 → `self_attn.q_proj`; fused experts have no `.weight`."""
    assert tensor.source is not None
    return tensor.source.partition(f"layers.{layer}.")[2].removesuffix(".weight")
