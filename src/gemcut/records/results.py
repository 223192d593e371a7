"""`manifest.json` and `kld.json`: facts from written bytes, and a measured difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import cast

from gemcut.records.fields import Fields, check_schema, open_record, to_json
from gemcut.records.typed import read
from gemcut.store import write_json
from gemcut.types import Json, KldResult, KldRow, Manifest, TensorFact

MANIFEST_SCHEMA = 2  # 2: tensors are hashed with BLAKE3 instead of SHA-256
KLD_SCHEMA = 1


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write `manifest.json`; the caller writes it last, after every file it speaks of."""
    write_json(path, cast("dict[str, Json]", to_json(manifest)))


def load_manifest(path: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        UsageError: there is no such file.
        CheckpointError: wrong types, another schema, a tensor twice, or a file name that leaves the folder.
    """
    f = open_record(path, "manifest", MANIFEST_SCHEMA)
    tensors = f.children("tensors", _read_fact)
    seen: set[str] = set()
    for i, fact in enumerate(tensors):
        if fact.name in seen:
            f.refuse(f"tensors[{i}].name", f"{fact.name!r} a second time", "every tensor once")
        seen.add(fact.name)
    return read(
        Manifest,
        f,
        tensors=tensors,
        config_changes=_read_changes(f.child("config_changes")),
        files=_read_files(f.child("files")),
    )


def _read_changes(f: Fields) -> Mapping[str, tuple[Json, Json]]:
    out: dict[str, tuple[Json, Json]] = {}
    for key in f.names():
        pair = f.free(key)
        if not isinstance(pair, list) or len(pair) != 2:
            f.refuse(key, pair, "[before, after]")
        out[f.check_text(key, key)] = (pair[0], pair[1])
    return out


def _read_files(f: Fields) -> Mapping[str, str]:
    out: dict[str, str] = {}
    for name in f.names():
        parts = PurePosixPath(name).parts
        if not name.isprintable() or "\\" in name or ":" in name or name.startswith("/") or ".." in parts or not parts:
            f.refuse(name, name, "a file name inside the folder")
        out[name] = f.digest(name)
    return out


def _read_fact(f: Fields) -> TensorFact:
    hashes = {name: None if f.raw(name) is None else f.digest(name) for name in ("blake3_before", "blake3_after")}
    axis = None if f.raw("axis") is None else f.count("axis", 0, 15)
    fact = read(TensorFact, f, name=f.text("name", empty=False), axis=axis, **hashes)
    if fact.found in ("take", "mask"):
        if fact.axis is None or fact.index is None:
            f.refuse("index", None, f"axis and index for {fact.found!r}")
        if list(fact.index) != sorted(set(fact.index)):
            f.refuse("index", list(fact.index), "strictly increasing positions")
    return fact


# ---------------------------------------------------------------- kld


def kld_to_json(result: KldResult) -> dict[str, Json]:
    """The JSON form of a KldResult, with its schema first."""
    return {"schema": KLD_SCHEMA, **cast("dict[str, Json]", to_json(result))}


def kld_from_json(value: object, file: Path) -> KldResult:
    """A KldResult from JSON; `file` names the source in errors.

    Raises:
        CheckpointError: wrong types, another schema, or a number that is not finite.
    """
    f = Fields(value, file)
    check_schema(f, "KLD result", KLD_SCHEMA)
    f.count("schema")
    return read(KldResult, f, rows=f.children("rows", _read_row))


def save_kld(result: KldResult, path: Path) -> None:
    """Write `kld.json`."""
    write_json(path, kld_to_json(result))


def load_kld(path: Path) -> KldResult:
    """Read `kld.json`."""
    f = open_record(path, "KLD result", KLD_SCHEMA)
    return kld_from_json({key: f.raw(key) for key in f.names()}, path)


def _read_row(f: Fields) -> KldRow:
    return read(KldRow, f, cls=f.text("cls", empty=False))
