"""`manifest.json` and `kld.json`: facts from written bytes, and a measured difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import cast, get_args

from gemcut.records.fields import Fields, check_schema, open_record, to_json
from gemcut.store import write_json
from gemcut.types import Estimate, Found, Json, KldResult, KldRow, Manifest, TensorFact

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
    manifest = Manifest(
        schema=f.count("schema"),
        base_fingerprint=f.text("base_fingerprint"),
        fingerprint=f.text("fingerprint"),
        tensors=tensors,
        config_changes=_read_changes(f.child("config_changes")),
        files=_read_files(f.child("files")),
        size_bytes_before=f.count("size_bytes_before"),
        size_bytes_after=f.count("size_bytes_after"),
    )
    f.done()
    return manifest


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
    found = f.text("found")
    if found not in get_args(Found):
        f.refuse("found", found, ", ".join(get_args(Found)))
    fact = TensorFact(
        name=f.text("name", empty=False),
        found=cast(Found, found),
        dtype=f.text("dtype"),
        shape_before=_optional_counts(f, "shape_before"),
        shape_after=_optional_counts(f, "shape_after"),
        blake3_before=None if f.raw("blake3_before") is None else f.digest("blake3_before"),
        blake3_after=None if f.raw("blake3_after") is None else f.digest("blake3_after"),
        axis=None if f.raw("axis") is None else f.count("axis", 0, 15),
        index=_optional_counts(f, "index"),
        relative_change=None if f.raw("relative_change") is None else f.number("relative_change"),
    )
    f.done()
    if found in ("take", "mask"):
        if fact.axis is None or fact.index is None:
            f.refuse("index", None, f"axis and index for {found!r}")
        if list(fact.index) != sorted(set(fact.index)):
            f.refuse("index", list(fact.index), "strictly increasing positions")
    return fact


def _optional_counts(f: Fields, key: str) -> tuple[int, ...] | None:
    return None if f.raw(key) is None else f.counts(key)


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
    result = KldResult(
        base_fingerprint=f.text("base_fingerprint"),
        candidate_fingerprint=f.text("candidate_fingerprint"),
        candidate=f.text("candidate"),
        corpus_hash=f.text("corpus_hash"),
        template_hash=f.text("template_hash"),
        dtype=f.text("dtype"),
        chunks=f.count("chunks"),
        seed=f.count("seed"),
        rows=f.children("rows", _read_row),
    )
    f.done()
    return result


def save_kld(result: KldResult, path: Path) -> None:
    """Write `kld.json`."""
    write_json(path, kld_to_json(result))


def load_kld(path: Path) -> KldResult:
    """Read `kld.json`."""
    f = open_record(path, "KLD result", KLD_SCHEMA)
    return kld_from_json({key: f.raw(key) for key in f.names()}, path)


def _read_row(f: Fields) -> KldRow:
    row = KldRow(
        cls=f.text("cls", empty=False),
        tokens=f.count("tokens"),
        mean=_read_estimate(f.child("mean")),
        median=_read_estimate(f.child("median")),
        p99=_read_estimate(f.child("p99")),
        same_top=_read_estimate(f.child("same_top")),
        ln_ppl_ratio=_read_estimate(f.child("ln_ppl_ratio")),
        ppl_base=f.number("ppl_base"),
        ppl_candidate=f.number("ppl_candidate"),
    )
    f.done()
    return row


def _read_estimate(f: Fields) -> Estimate:
    out = Estimate(value=f.number("value"), low=f.number("low"), high=f.number("high"), n=f.count("n"))
    f.done()
    return out
