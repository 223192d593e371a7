"""Files of every type, with and without importances: what goldens and the comparison with llama.cpp's tools share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from gemcut.checkpoint import Checkpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix import Entry, Imatrix, wants_importance, write_imatrix
from gemcut.export.mix.stock import file_types, starved_of_imatrix, stock_types
from gemcut.export.mix.tables import LARGE_ENDS
from gemcut.exporting import GgufWords, file_stem, plan_export, write_export
from gemcut.families.gguf import GgufLayout
from gemcut.gguf_file import GgufFile, read_gguf

TYPES = tuple(name for name in file_types() if name not in LARGE_ENDS)
"""llama-quantize's own, largest first."""


def made_imatrix(layout: GgufLayout, path: Path) -> Path:
    """Importances of every tensor that can have some, over eight decades, with experts that saw nothing.

    Made from a generator whose stream numpy promises never to change.
    """
    rng = np.random.RandomState(20)
    entries = {}
    for tensor in layout.tensors:
        if not wants_importance(tensor):
            continue
        units, columns = (tensor.shape[0] if len(tensor.shape) == 3 else 1), tensor.shape[-1]
        counts = rng.randint(0, 4, units) * 37 if units > 1 else np.array([4096])
        sums = np.exp(rng.standard_normal((units, columns)) * 3) * counts[:, None]
        entries[tensor.name] = Entry(sums.astype(np.float32), counts.astype(np.int64))
    write_imatrix(path, Imatrix(entries, datasets=("made",), chunks=8, chunk_size=512))
    return path


def payload_digest(file: GgufFile) -> str:
    """sha256 over name, type, shape and bytes of every tensor, in the order of the file."""
    digest = hashlib.sha256()
    for ref in file.tensors.values():
        digest.update(f"{ref.name}\0{ref.kind.name}\0{ref.shape}\0".encode())
        digest.update(file.read(ref.name).data)
    return digest.hexdigest()


def possible(layout: GgufLayout, *, imatrix: bool) -> list[str]:
    """The file types that can be written with or without importances."""
    out = []
    for name in TYPES:
        try:
            types = stock_types(name, layout, imatrix=imatrix)
        except UsageError:  # rows that do not fit, and no type stands in
            continue
        if imatrix or not starved_of_imatrix(name, types):
            out.append(name)
    return out


def write_types(
    checkpoint: Checkpoint, types: list[str], imatrix: Path | None, out: Path, threads: int
) -> dict[str, Path]:
    """One file for each type."""
    exports = plan_export(checkpoint, GgufWords(tuple(types), imatrix))
    write_export(exports, out, threads=threads)
    return {name: out / f"{file_stem(checkpoint)}-{name}.gguf" for name in types}


def digests(files: dict[str, Path]) -> dict[str, str]:
    """File type → payload digest."""
    return {name: payload_digest(read_gguf(path)) for name, path in files.items()}
