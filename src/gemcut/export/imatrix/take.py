"""Importances after a cut: those of the units and columns that stay, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gemcut.export.imatrix.entries import Entry, Imatrix, fit
from gemcut.families.gguf import GgufLayout
from gemcut.types import Edit, Replace, Take


def take(imatrix: Imatrix, layout: GgufLayout, edits: Mapping[str, Edit]) -> Imatrix:
    """The importances of a model after these edits, from those of the model before them.

    A fused tensor [E, rows, columns] loses the sums and counts of its dropped experts, a tensor that loses columns
    loses their sums. Nothing else changes: what the kept ones saw stays as it was counted, so every kept expert is
    quantised as it was before.

    Args:
        layout: of the model before.   edits: by the names of the checkpoint.
    Raises:
        CheckpointError: the importances are of another model.
    """
    imatrix = fit(imatrix, layout)
    entries = dict(imatrix.entries)
    starved = dict(imatrix.starved)
    for tensor in layout.tensors:
        found, entry = edits.get(tensor.source or ""), entries.get(tensor.name)
        edit = found.then if isinstance(found, Replace) else found
        if entry is None or not isinstance(edit, Take):
            continue
        index = np.array(edit.index)
        if edit.axis == len(tensor.shape) - 1:
            entries[tensor.name] = Entry(np.ascontiguousarray(entry.sums[:, index]), entry.counts)
        elif edit.axis == 0 and len(tensor.shape) == 3:
            entries[tensor.name] = Entry(entry.sums[index], entry.counts[index])
            place = {unit: i for i, unit in enumerate(edit.index)}
            kept = tuple(place[unit] for unit in starved.pop(tensor.name, ()) if unit in place)
            starved |= {tensor.name: kept} if kept else {}
    return replace(imatrix, entries=entries, starved=starved, model_fingerprint="")
