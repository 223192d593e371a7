"""Two importance matrices of one model on two texts are one of both."""

from __future__ import annotations

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.export.imatrix.entries import Entry, Imatrix, entry_of
from gemcut.export.imatrix.starved import shrink, starved_units, unshrink
from gemcut.store import fingerprint
from gemcut.types import F64


def refuse_unaddable(one: Imatrix) -> None:
    """Refuse what adds to no other importance matrix.

    Raises:
        UsageError: it holds something else than sums of squares, or has lost its counts.
    """
    if one.variant != "plain":
        raise UsageError(
            f"importances of variant {one.variant!r} do not add up",
            wanted="two plain files",
            hint="merge the statistics or plain files, and choose the variant afterwards",
        )
    if one.roundings > 1:
        raise UsageError(
            "importances with roundings do not add up", hint="merge plain files that were made without --roundings"
        )
    if not one.chunk_size:
        raise UsageError(
            "an imatrix of llama.cpp's older form has lost its counts, and does not add up",
            hint="make it anew in the GGUF form",
        )


def merge(first: Imatrix, second: Imatrix) -> Imatrix:
    """The importance matrix of both texts: sums and counts add; who starves is asked again of the whole.

    Raises:
        UsageError: one of them holds something else than sums of squares.
        CheckpointError: they are of different models: fingerprints, names or shapes differ.
    """
    for one in (first, second):
        refuse_unaddable(one)
    if first.corpus_hash and first.corpus_hash == second.corpus_hash:
        raise UsageError("both are of the same text: it would count twice", got=f"corpus {first.corpus_hash[:12]}…")
    known = {one.model_fingerprint for one in (first, second) if one.model_fingerprint}
    if len(known) > 1:
        raise CheckpointError(
            "the two files are of different models", got=", ".join(f"{v[:12]}…" for v in sorted(known))
        )
    if odd := sorted(first.entries.keys() ^ second.entries.keys()):
        raise CheckpointError(
            "the two files are of different models: a tensor is only in one of them",
            where=odd[0],
            got=f"{len(odd)} such",
        )
    prior = max(first.prior_tokens, second.prior_tokens)
    entries: dict[str, Entry] = {}
    starved: dict[str, tuple[int, ...]] = {}
    for name in first.entries:
        sums, counts = _added(name, first, second)
        units = starved_units(counts) if prior else ()
        if units:
            starved[name] = units
        entries[name] = entry_of(*shrink(sums, counts, units, prior))
    sizes = {one.chunk_size for one in (first, second)}
    return Imatrix(
        entries=entries,
        datasets=tuple(dict.fromkeys((*first.datasets, *second.datasets))),
        chunks=first.chunks + second.chunks,
        chunk_size=max(sizes),
        prior_tokens=prior,
        starved=starved,
        model_fingerprint=next(iter(known), ""),
        corpus_hash=fingerprint({"merged": [first.corpus_hash, second.corpus_hash]}),
    )


def _added(name: str, first: Imatrix, second: Imatrix) -> tuple[F64, F64]:
    parts = []
    for one in (first, second):
        entry = one.entries[name]
        parts.append(
            unshrink(
                entry.sums.astype(np.float64),
                entry.counts.astype(np.float64),
                one.starved.get(name, ()),
                one.prior_tokens,
            )
        )
    (a, n), (b, k) = parts
    if a.shape != b.shape or n.shape != k.shape:
        raise CheckpointError(
            "the two files are of different models: a tensor has two shapes", where=name, got=(a.shape, b.shape)
        )
    return a + b, n + k
