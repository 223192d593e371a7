"""Where a GGUF file comes from, in its own metadata: names and hashes, never a place on somebody's disk."""

from __future__ import annotations

import re

from blake3 import blake3

from gemcut import __version__
from gemcut.export.imatrix import Imatrix
from gemcut.families.gguf import Value

_PLACE = re.compile(r".*[/\\]", re.DOTALL)
_OWN = "gemcut."


def provenance(
    parent: str, quantiser: str, imatrix: Imatrix | None, imatrix_file: str = "", *, cut: str = ""
) -> dict[str, Value]:
    """Keys behind all others. `quantize.imatrix.*` are llama-quantize's, without folders.

    Args:
        parent: fingerprint of the checkpoint.   quantiser: identity of the library.
        imatrix_file: name of the importance matrix' file.   cut: fingerprint of what a plan left of the checkpoint.
    """
    out: dict[str, Value] = {}
    if imatrix is not None:
        out["quantize.imatrix.file"] = Value("str", _PLACE.sub("", imatrix_file))
        if imatrix.datasets:
            out["quantize.imatrix.dataset"] = Value("str", _PLACE.sub("", imatrix.datasets[0]))
        out["quantize.imatrix.entries_count"] = Value("u32", len(imatrix.entries))
        if imatrix.chunks > 0:
            out["quantize.imatrix.chunks_count"] = Value("u32", imatrix.chunks)
    out[f"{_OWN}version"] = Value("str", __version__)
    out[f"{_OWN}quantiser"] = Value("str", quantiser)
    out[f"{_OWN}parent.fingerprint"] = Value("str", parent)
    if cut:
        out[f"{_OWN}cut.fingerprint"] = Value("str", cut)
    if imatrix is not None:
        out[f"{_OWN}imatrix.hash"] = Value("str", imatrix_hash(imatrix))
        out[f"{_OWN}imatrix.variant"] = Value("str", imatrix.variant)
        if imatrix.roundings > 1:
            out[f"{_OWN}imatrix.roundings"] = Value("u32", imatrix.roundings)
        if imatrix.corpus_hash:
            out[f"{_OWN}corpus.hash"] = Value("str", imatrix.corpus_hash)
    return out


def imatrix_hash(imatrix: Imatrix) -> str:
    """BLAKE3 over names, sums and counts: the same whatever the file's form and order."""
    digest = blake3()
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        digest.update(f"{name}\0{entry.sums.shape}\0".encode())
        digest.update(entry.sums.astype("<f4").tobytes())
        digest.update(entry.counts.astype("<i8").tobytes())
    return digest.hexdigest()
