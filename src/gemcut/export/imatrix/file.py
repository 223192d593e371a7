"""Importance matrices on disk: llama.cpp's GGUF form, written; the same and its older binary form, read.

    general.type = "imatrix"   imatrix.datasets [str]   imatrix.chunk_count u32   imatrix.chunk_size u32
    <tensor>.in_sum2 F32 [U, F]   <tensor>.counts F32 [U, 1]

gemcut adds what llama.cpp does not ask for: keys gemcut.imatrix.{variant, prior_tokens, starved, roundings, model,
corpus}, and, where blocks are picked, <tensor>.mean and <tensor>.spread F32 [U, F].
Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp b11549.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.export.imatrix.entries import MAX_ROUNDINGS, Entry, Imatrix, Inputs, Variant
from gemcut.families.gguf import Value
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import GgufFile, gguf_writer, lay_out, read_gguf
from gemcut.store import refuse_existing
from gemcut.types import F32

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MEAN, _SPREAD = ".mean", ".spread"
_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_OWN = "gemcut.imatrix."
_MAX_COUNT = 2.0**53
_MAX_UNITS = 1 << 16
_AGAIN = "make it again with gemcut imatrix"
_LEGACY_MAX_ENTRIES = 1 << 20
_LEGACY_MAX_NAME = 512
_LEGACY_MAX_BYTES = 2 << 30  # a 31B's takes 25 MB


def write_imatrix(path: Path, imatrix: Imatrix, *, force: bool = False) -> None:
    """Write llama.cpp's GGUF form, tensors in order of their names, whole or not at all.

    Raises:
        UsageError: the file exists and not `force`; there is no entry, or a name is too long for GGUF.
        MissingError: the disk is full or cannot be written.
    """
    refuse_existing(path, force=force)
    if not imatrix.entries:
        raise UsageError("an imatrix without entries says nothing", where=path.name)
    starved = tuple(f"{name}:{','.join(map(str, units))}" for name, units in sorted(imatrix.starved.items()))
    metadata = {
        _TYPE: Value("str", "imatrix"),
        _DATASETS: Value("str", imatrix.datasets or ("unknown",)),
        _CHUNKS: Value("u32", imatrix.chunks),
        _CHUNK_SIZE: Value("u32", imatrix.chunk_size),
        f"{_OWN}variant": Value("str", imatrix.variant),
        f"{_OWN}prior_tokens": Value("u32", imatrix.prior_tokens),
        f"{_OWN}starved": Value("str", starved),
        f"{_OWN}roundings": Value("u32", imatrix.roundings),
        f"{_OWN}model": Value("str", imatrix.model_fingerprint),
        f"{_OWN}corpus": Value("str", imatrix.corpus_hash),
    }
    payloads: dict[str, F32] = {}
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        payloads[name + _SUMS] = np.ascontiguousarray(entry.sums, "<f4")
        payloads[name + _COUNTS] = entry.counts.astype("<f4")[:, None]
        if (inputs := imatrix.inputs.get(name)) is not None:
            payloads[name + _MEAN] = np.ascontiguousarray(inputs.mean, "<f4")
            payloads[name + _SPREAD] = np.ascontiguousarray(inputs.spread, "<f4")
    tensors = [(name, GgmlType.F32, values.shape) for name, values in payloads.items()]
    with gguf_writer(path, lay_out(metadata, tensors, name=path.name)) as writer:
        for name, values in payloads.items():
            writer.write(name, 0, memoryview(values.view(np.uint8).reshape(-1).data))


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix of llama.cpp or of gemcut. Hold it against a model with `fit` before it is used.

    The older binary form has lost how many rows each expert saw: every tensor comes as one unit, its sums as wide as
    all experts together, its count in chunks.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is no imatrix, is cut off, or holds what cannot have been summed.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            magic = f.read(4)
    except FileNotFoundError:
        raise UsageError(
            "there is no such imatrix",
            where=str(path),
            hint="check the path; gemcut imatrix MODEL --corpus … makes one",
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read the imatrix: {error.strerror}", where=str(path)) from None
    return _from_gguf(read_gguf(path)) if magic == b"GGUF" or magic == bytes(4) else _from_legacy(path)


def _from_gguf(file: GgufFile) -> Imatrix:
    where = file.path.name
    if file.value(_TYPE) != "imatrix":
        raise CheckpointError(
            "this GGUF file is no imatrix", where=where, got=repr(file.value(_TYPE))[:60], wanted=f'{_TYPE} "imatrix"'
        )
    for key in (_DATASETS, _CHUNKS, _CHUNK_SIZE):
        if key not in file.metadata:
            raise CheckpointError("the imatrix has no metadata that llama-quantize asks for", where=where, wanted=key)
    names = sorted({_stem(name) for name in file.tensors} - {""})
    if not names:
        raise CheckpointError("the imatrix has no entries", where=where, hint=_AGAIN)
    entries = {name: _entry(file, name) for name in names}
    starved = _starved(_texts(file, f"{_OWN}starved"), entries, where)
    said = file.value(f"{_OWN}variant") or "plain"
    known: dict[object, Variant] = {one: one for one in get_args(Variant)}
    if not isinstance(said, str) or said not in known:
        raise CheckpointError("unknown variant of importances", where=where, got=repr(said)[:60])
    prior = _count(file, f"{_OWN}prior_tokens")
    rounds = _count(file, f"{_OWN}roundings") or 1
    if rounds > MAX_ROUNDINGS:
        raise CheckpointError("too many roundings", where=where, got=rounds, wanted=f"at most {MAX_ROUNDINGS}")
    for name, units in starved.items():
        if entries[name].counts[list(units)].min() < prior:
            raise CheckpointError("a starved expert saw less than nothing", where=f"{name} in {where}")
    return Imatrix(
        entries=entries,
        datasets=_without_folders(_texts(file, _DATASETS)),
        chunks=_count(file, _CHUNKS),
        chunk_size=_count(file, _CHUNK_SIZE),
        variant=known[said],
        prior_tokens=prior,
        starved=starved,
        roundings=rounds,
        inputs={name: _inputs(file, name) for name in names if name + _MEAN in file.tensors},
        model_fingerprint=_text(file, f"{_OWN}model"),
        corpus_hash=_text(file, f"{_OWN}corpus"),
    )


def _stem(name: str) -> str:
    for suffix in (_SUMS, _COUNTS):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return ""


def _damaged(error: CheckpointError, where: str) -> CheckpointError:
    """The same with its place, and what to do."""
    return CheckpointError(error.what, where=where, got=error.got, wanted=error.wanted, hint=_AGAIN)


def _entry(file: GgufFile, name: str) -> Entry:
    where = f"{name[:120]} in {file.path.name}"
    if name + _SUMS not in file.tensors or name + _COUNTS not in file.tensors:
        raise CheckpointError("sums without counts, or counts without sums", where=where, hint=_AGAIN)
    sums, counts = file.tensors[name + _SUMS], file.tensors[name + _COUNTS]
    if sums.kind != GgmlType.F32 or counts.kind != GgmlType.F32:
        raise CheckpointError("sums and counts must be F32", where=where, got=f"{sums.kind.name}, {counts.kind.name}")
    values = file.read(sums.name).view("<f4")
    seen = file.read(counts.name).view("<f4")
    units = len(seen)
    if not 1 <= units <= _MAX_UNITS or not len(values) or len(values) % units:
        raise CheckpointError(
            "sums and counts do not belong together", where=where, got=f"{len(values)} sums, {units} counts"
        )
    wrong = ~((seen >= 0) & (seen <= _MAX_COUNT))  # NaN is neither
    if wrong.any():
        raise CheckpointError(
            "a count is impossible", where=where, got=float(seen[wrong][0]), wanted=f"0 to {_MAX_COUNT:g}", hint=_AGAIN
        )
    try:
        return Entry(values.reshape(units, -1), np.floor(seen.astype(np.float64) + 0.5).astype(np.int64))
    except CheckpointError as error:
        raise _damaged(error, where) from None


def _inputs(file: GgufFile, name: str) -> Inputs:
    where = f"{name[:120]} in {file.path.name}"
    mean, spread = file.tensors[name + _MEAN], file.tensors.get(name + _SPREAD)
    if spread is None or (mean.kind, spread.kind) != (GgmlType.F32, GgmlType.F32) or mean.shape != spread.shape:
        raise CheckpointError("means without spreads, or of another form", where=where, hint=_AGAIN)
    try:
        return Inputs(*(file.read(ref.name).view("<f4").reshape(ref.shape) for ref in (mean, spread)))
    except CheckpointError as error:
        raise _damaged(error, where) from None


def _count(file: GgufFile, key: str) -> int:
    found = file.metadata.get(key)
    if found is None:
        return 0
    if found.kind != "u32" or not isinstance(found.value, int):
        raise CheckpointError("a number of the imatrix is no u32", where=f"{key} in {file.path.name}", got=found.kind)
    return found.value


def _text(file: GgufFile, key: str) -> str:
    found = file.value(key)
    if found is not None and not isinstance(found, str):
        raise CheckpointError("a text of the imatrix is none", where=f"{key} in {file.path.name}")
    return found or ""


def _texts(file: GgufFile, key: str) -> tuple[str, ...]:
    found = file.metadata.get(key)
    if found is None:
        return ()
    if found.kind != "str" or not isinstance(found.value, tuple):
        raise CheckpointError("a list of texts of the imatrix is none", where=f"{key} in {file.path.name}")
    return tuple(str(one) for one in found.value)


def _without_folders(datasets: tuple[str, ...]) -> tuple[str, ...]:
    """llama-imatrix writes paths of its user's machine; the file's name says enough."""
    return tuple(re.split(r"[/\\\\]", one)[-1] for one in datasets)


def _starved(lines: tuple[str, ...], entries: Mapping[str, Entry], where: str) -> dict[str, tuple[int, ...]]:
    """`name:unit,unit` for each tensor that has starved units."""
    out: dict[str, tuple[int, ...]] = {}
    for line in lines:
        name, _, rest = line.rpartition(":")
        units = rest.split(",")
        ok = name in entries and name not in out and len(set(units)) == len(units)
        if not ok or not all(u.isascii() and u.isdigit() and int(u[:9]) < len(entries[name].counts) for u in units):
            raise CheckpointError("the list of starved experts is damaged", where=where, got=line[:80])
        out[name] = tuple(int(u) for u in units)
    return out


# ---------------------------------------------------------------- the older form


def _from_legacy(path: Path) -> Imatrix:
    """i32 entries · (i32 length, name, i32 calls, i32 values, f32 values)… · i32 chunks · i32 length, dataset."""
    with open(path, "rb") as f:
        raw = f.read(8)  # any file may come: two numbers are looked at before the rest is read
        head = struct.unpack("<2i", raw) if len(raw) == 8 else (0, 0)
        if 1 <= head[0] <= _LEGACY_MAX_ENTRIES and 1 <= head[1] <= _LEGACY_MAX_NAME:
            if os.fstat(f.fileno()).st_size > _LEGACY_MAX_BYTES:
                wanted = f"at most {_LEGACY_MAX_BYTES} bytes"
                raise CheckpointError("the imatrix is too large", where=path.name, wanted=wanted)
            raw += f.read(_LEGACY_MAX_BYTES)
    at = 0

    def number(what: str, low: int, high: int) -> int:
        nonlocal at
        if at + 4 > len(raw):
            raise CheckpointError(f"the imatrix ends before {what}", where=path.name, hint="was its writer killed?")
        (value,) = struct.unpack_from("<i", raw, at)
        if not low <= value <= high:
            raise CheckpointError(
                "this is no imatrix", where=path.name, got=f"{value} as {what}", wanted=f"{low} to {high}, or GGUF"
            )
        at += 4
        return int(value)

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if at + size > len(raw):
            raise CheckpointError(f"the imatrix ends inside {what}", where=path.name, hint="was its writer killed?")
        at += size
        return raw[at - size : at]

    entries: dict[str, Entry] = {}
    for _ in range(number("its number of entries", 1, _LEGACY_MAX_ENTRIES)):
        name = take(number("the length of a name", 1, _LEGACY_MAX_NAME), "a name").decode("utf-8", "replace")
        calls = number("a number of calls", 1, 1 << 30)
        width = number("a number of values", 1, 1 << 30)
        if name in entries:
            raise CheckpointError("an entry is repeated", where=f"{name[:120]} in {path.name}")
        values = np.frombuffer(take(4 * width, f"the values of {name[:120]}"), "<f4")
        try:
            entries[name] = Entry(values.reshape(1, -1), np.array([calls], np.int64))
        except CheckpointError as error:
            raise _damaged(error, f"{name[:120]} in {path.name}") from None
    chunks = 0
    datasets: tuple[str, ...] = ()
    if at < len(raw):
        chunks = number("its number of chunks", 0, 1 << 30)
        text = take(number("the length of the dataset's name", 0, 1 << 16), "the dataset's name")
        datasets = _without_folders((text.decode("utf-8", "replace"),))
    return Imatrix(entries=entries, datasets=datasets, chunks=chunks)
