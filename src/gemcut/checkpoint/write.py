"""Apply edits to a checkpoint shard by shard and write a new folder beside which lies what was found in its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemcut.checkpoint.compare import Stored
from gemcut.checkpoint.diff import config_changes, make_manifest
from gemcut.checkpoint.folder import MANIFEST, SUMS, copy_file, link_file, list_files, size_of, sums_text
from gemcut.checkpoint.gather import check_edits, edited, is_identity
from gemcut.checkpoint.header import MAX_HEADER_BYTES, lay_out
from gemcut.checkpoint.ledger import Ledger
from gemcut.checkpoint.made import NO_TENSORS, MadeTensors, check_made
from gemcut.checkpoint.read import CONFIG, INDEX, Checkpoint, Progress, open_checkpoint
from gemcut.checkpoint.transfer import Flusher, Shard, Transfer
from gemcut.errors import CheckpointError, UsageError
from gemcut.records import save_manifest
from gemcut.store import atomic_folder, fsync_folder, need_disk, refuse_existing, sha256_file, write_bytes
from gemcut.types import Edits, Json, Manifest, TensorRef

_NUDGE_BYTES = 256 << 20
_SPARE_BYTES = 64 << 20  # index, config, manifest, and what the file system keeps for itself


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written: the manifest is computed from the written bytes."""

    manifest: Manifest
    edited: tuple[str, ...]  # shards with at least one edit
    linked: tuple[str, ...]  # shards that share their bytes with the base
    copied: tuple[str, ...]  # shards copied byte for byte
    size_bytes_written: int


def write_checkpoint(
    base: Checkpoint,
    edits: Edits,
    config: Mapping[str, Json],
    out: Path,
    *,
    force: bool = False,
    link: bool = True,
    made: MadeTensors = NO_TENSORS,
    files: Callable[[], Mapping[str, bytes | None]] | None = None,
    progress: Progress | None = None,
) -> WriteReport:
    """Write `base` with `edits`, `made` tensors and `config` to the folder `out`.

    The base's shard split, tensor order and header metadata are kept. Shards without an edit are hard-linked (`link`)
    or copied; every other file is copied byte for byte; config.json and the index are patched only where they change.
    While shards are written, threads read them back, hash them and compare them with the base: the manifest is made
    of that. `out` appears whole or not at all. Memory does not grow with the tensors.

    Args:
        made: tensors that the base does not have, computed as they are written.
        files: what else lies in the folder, by name, in place of the base's, None to leave that out; asked for after
            the last tensor.
    Raises:
        UsageError: `out` exists without `force`, or is the base itself, inside it or around it.
        MissingError: the disk is full or too small.
        CheckpointError: the edits do not fit, or what was written does not read back as meant.
    """
    check_edits(base.tensors, edits)
    staying = {new.name for ref in base.tensors.values() if (new := edited(ref, edits.get(ref.name))) is not None}
    check_made(base.tensors, made, staying)
    _refuse_overlap(base.path, out)
    refuse_existing(out, force=force)
    shards = lay_out_shards(base, edits, made)
    others = [f for f in list_files(base.path) if f not in base.shards and f not in (CONFIG, INDEX)]
    link = link and _same_device(base.path, out)
    written = [shard for shard in shards if shard.touched or not link]
    size_bytes = sum(shard.header.size_bytes for shard in written)
    need_disk(out, size_bytes + size_of(base.path, others) + _SPARE_BYTES)
    linked: list[str] = []
    with atomic_folder(out, force=force) as folder, Ledger() as ledger, Flusher() as flusher:
        transfer = Transfer(base, edits, folder, ledger, flusher, progress, size_bytes)
        for shard in shards:
            if not shard.touched and link and link_file(base.path / shard.name, folder / shard.name):
                linked.append(shard.name)
                transfer.compare_linked(shard)
            else:
                transfer.write(shard)
        for name in base.shards.keys() - {shard.name for shard in shards}:
            for ref in base.shards[name].tensors:
                ledger.compare(Stored(base.path / name, ref), None)
        added = {} if files is None else files()
        for name in others:
            if name not in added:
                copy_file(base.path / name, folder / name)
        for name, content in added.items():
            if content is not None:
                write_bytes(folder / name, content)
        _write_config(base, config, folder)
        _write_index(base, shards, folder)
        manifest = _read_back(base, shards, folder, transfer)
        save_manifest(manifest, folder / MANIFEST)
        sums = {**manifest.files, MANIFEST: sha256_file(folder / MANIFEST)}
        write_bytes(folder / SUMS, sums_text(sums).encode())
        flusher.wait()
        for parent in {(folder / name).parent for name in (*others, *added)}:
            fsync_folder(parent)
    return WriteReport(
        manifest=manifest,
        edited=tuple(shard.name for shard in shards if shard.touched),
        linked=tuple(linked),
        copied=tuple(shard.name for shard in shards if not shard.touched and shard.name not in linked),
        size_bytes_written=sum(shard.header.size_bytes for shard in shards if shard.name not in linked),
    )


def _refuse_overlap(base: Path, out: Path) -> None:
    a, b = base.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(
            "the output and the checkpoint it comes from are one folder, or one lies in the other",
            where=str(out),
            hint="choose another -o: inputs are never modified",
        )


def _same_device(base: Path, out: Path) -> bool:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return base.stat().st_dev == parent.stat().st_dev


def lay_out_shards(base: Checkpoint, edits: Edits, made: MadeTensors = NO_TENSORS) -> list[Shard]:
    """Every shard that will hold something: sizes are known before the first byte is written."""
    shards = [_shard(name, base, edits, made) for name in base.shards]
    return [shard for shard in shards if shard.header.tensors]


def _shard(name: str, base: Checkpoint, edits: Edits, made: MadeTensors) -> Shard:
    header = base.shards[name]
    kept: list[TensorRef] = []
    new: list[TensorRef] = []
    omitted: list[TensorRef] = []
    for ref in header.tensors:
        after = edited(ref, edits.get(ref.name))
        if after is None:
            omitted.append(ref)
        else:
            kept.append(ref)
            new.append(after)
    mine = tuple(made[ref.name] for ref in header.tensors if ref.name in made)
    if not mine and all(is_identity(ref, edits.get(ref.name)) for ref in header.tensors):
        return Shard(name, header.tensors, header, (), touched=False)
    # What is made lies in front: its numbers are wider than one byte here and there, and what stays may end anywhere.
    laid = lay_out(name, [*(ref for one in mine for ref in one.tensors), *new], header.metadata)
    if len(laid.raw) > MAX_HEADER_BYTES:
        raise CheckpointError("the new header would be too large", where=name, got=f"{len(laid.raw)} bytes")
    return Shard(name, tuple(kept), laid, tuple(omitted), touched=True, made=mine)


def _write_config(base: Checkpoint, config: Mapping[str, Json], folder: Path) -> None:
    if not config_changes(base.config, config):
        copy_file(base.path / CONFIG, folder / CONFIG)
        return
    ascii_only = (base.path / CONFIG).read_bytes().isascii()
    text = json.dumps(dict(config), indent=2, allow_nan=False, ensure_ascii=ascii_only)
    write_bytes(folder / CONFIG, (text + "\n").encode())


def _write_index(base: Checkpoint, shards: list[Shard], folder: Path) -> None:
    """The index last: same order and metadata keys; total_size and total_parameters follow the tensors."""
    if base.index is None:
        return
    where: dict[str, str] = {}
    added: dict[str, Json] = {}
    size_bytes = elements = 0
    for shard in shards:
        for ref, new in zip(shard.sources, shard.kept, strict=True):
            where[ref.name] = new.name
            elements += new.elements
        size_bytes += sum(ref.size_bytes for ref in shard.header.tensors)
        added |= {ref.name: shard.name for one in shard.made for ref in one.tensors}
    weight_map = base.index["weight_map"]
    assert isinstance(weight_map, dict)
    new_map = {where[name]: shard for name, shard in weight_map.items() if name in where} | added
    if new_map == weight_map and size_bytes == base.size_bytes:
        copy_file(base.path / INDEX, folder / INDEX)
        return
    index = dict(base.index)
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = size_bytes
    parameters = metadata.get("total_parameters")
    if isinstance(parameters, int) and not added:  # the same weights in other numbers are as many parameters
        metadata["total_parameters"] = parameters - sum(r.elements for r in base.tensors.values()) + elements
    index["metadata"] = metadata
    index["weight_map"] = new_map
    write_bytes(folder / INDEX, (json.dumps(index, indent=2, allow_nan=False) + "\n").encode())


def _read_back(base: Checkpoint, shards: list[Shard], folder: Path, transfer: Transfer) -> Manifest:
    try:
        _ = base.family
        known = True
    except UsageError:
        known = False
    altered = any(shard.made for shard in shards)  # a family knows the shapes of plain weights
    written = open_checkpoint(folder, base.name, any_architecture=altered or not known)
    for shard in shards:
        if written.shards[shard.name].tensors != shard.header.tensors:
            raise CheckpointError("the written header reads back differently", where=shard.name)
    for name in list_files(folder):
        if name not in written.shards:
            transfer.ledger.hash_file(folder / name, name, (folder / name).stat().st_size)
    facts, files = transfer.finish()
    order = {name: i for i, name in enumerate(base.tensors)}
    facts = tuple(sorted(facts, key=lambda fact: order.get(fact.name, len(order))))
    return make_manifest(base, written, facts, files)
