"""An importance matrix held against the model and the types that it is for, before anything is quantised with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path

from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.edited import EditedCheckpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix import Imatrix, coverage, fit, read_imatrix, take
from gemcut.export.layout import layout_of
from gemcut.export.mix import stock
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import GgmlType

log = logging.getLogger(__name__)


def importances_of(path: Path, layout: GgufLayout, checkpoint: Checkpoint) -> Imatrix:
    """Importances of this model; of a cut on the way also those of its base, of which the kept units' are taken.

    Warns where they come from another model of the same shapes, and where their text has not reached enough: not every
    file has passed the gate of `gemcut imatrix`.

    Raises:
        UsageError: no such file.
        CheckpointError: it is damaged, or of another model.
    """
    read = read_imatrix(path)
    if isinstance(checkpoint, EditedCheckpoint) and not _is_of(read, layout):
        found = take(read, layout_of(checkpoint.base), checkpoint.edits)
    else:
        found = fit(read, layout)
        if found.model_fingerprint and found.model_fingerprint != checkpoint.fingerprint:
            log.warning(
                "%s was made from another checkpoint of the same shapes: its importances may not fit these weights; "
                "next: gemcut imatrix %s --corpus TEXT -o FILE makes one from this model",
                path.name,
                checkpoint.name,
            )
    _warn_of_gaps(found, path.name)
    return found


def refuse_starved(asked: str, file: str, types: Mapping[str, GgmlType], imatrix: Imatrix | None) -> None:
    """Types that are too small to be chosen without importances must have some, and those must have seen something.

    Args:
        asked: what the user called the file type.   file: its name in `stock`.   types: by tensor.
    Raises:
        UsageError: a tensor has none, or no row of the text entered it: llama-quantize would take ones.
    """
    starved = stock.starved_of_imatrix(file, types)
    missing = [name for name in starved if imatrix is None or name not in imatrix.entries]
    if missing:
        raise UsageError(
            f"{asked} needs an importance matrix" if imatrix is None else "the importance matrix lacks tensors",
            where=_named(missing),
            got=f"{types[missing[0]].name} without importances",
            hint="make one with gemcut imatrix, and pass it with --imatrix",
        )
    blind = [] if imatrix is None else [name for name in starved if not imatrix.entries[name].counts.any()]
    if blind:
        raise UsageError(
            "the importance matrix has seen nothing of tensors that need it",
            where=_named(blind),
            got=f"{types[blind[0]].name} with all counts 0",
            hint="make one from more text with gemcut imatrix, or take a larger type",
        )


def _warn_of_gaps(imatrix: Imatrix, file: str) -> None:
    """One line for tensors that saw nothing, one for layers whose experts the text starved."""
    blind = [name for name, entry in imatrix.entries.items() if not entry.counts.any()]
    if blind:
        log.warning("%s: no text has reached %s; their columns count alike", file, _named(blind))
    failed = coverage(imatrix).failed
    if failed:
        worst = max(failed, key=lambda one: one.starved_share)
        log.warning(
            "%s: the text starves experts of %d tensors, most in %s: %d of %d saw less than a fifth of the mean of "
            "%.0f rows, %d saw none; next: broaden the corpus, or merge in an imatrix of other text",
            file,
            len(failed),
            worst.name,
            len(worst.starved),
            worst.units,
            worst.mean,
            len(worst.unseen),
        )


def _named(tensors: list[str]) -> str:
    return tensors[0] + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")


def _is_of(imatrix: Imatrix, layout: GgufLayout) -> bool:
    shapes = {tensor.name: prod((*tensor.shape[:-2][:1], tensor.shape[-1])) for tensor in layout.tensors}
    return all(entry.sums.size == shapes.get(name) for name, entry in imatrix.entries.items())
