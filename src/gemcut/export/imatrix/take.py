"""Importances after a cut: those of the units and columns that stay, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from gemcut.export.imatrix.entries import Entry, Imatrix, Inputs, fit
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
    entries, inputs, starved = dict(imatrix.entries), dict(imatrix.inputs), dict(imatrix.starved)
    for tensor in layout.tensors:
        found, entry = edits.get(tensor.source or ""), entries.get(tensor.name)
        edit = found.then if isinstance(found, Replace) else found
        if entry is None or not isinstance(edit, Take):
            continue
        columns = edit.axis == len(tensor.shape) - 1
        if not columns and (edit.axis or len(tensor.shape) != 3):
            continue  # rows that share their importances
        kept = partial(np.take, indices=edit.index, axis=1 if columns else 0)
        entries[tensor.name] = Entry(kept(entry.sums), entry.counts if columns else kept(entry.counts))
        if (told := inputs.get(tensor.name)) is not None:
            inputs[tensor.name] = Inputs(kept(told.mean), kept(told.spread))
        if not columns:
            place = {unit: i for i, unit in enumerate(edit.index)}
            units = tuple(place[unit] for unit in starved.pop(tensor.name, ()) if unit in place)
            starved |= {tensor.name: units} if units else {}
    return replace(imatrix, entries=entries, inputs=inputs, starved=starved, model_fingerprint="")
