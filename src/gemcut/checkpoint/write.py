"""Apply edits to a checkpoint shard by shard and write a new folder beside which lies what was found in its bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gemcut.checkpoint.compare import Stored
from gemcut.checkpoint.diff import config_changes, make_manifest
from gemcut.checkpoint.folder import MANIFEST, SUMS, copy_file, link_file, list_files, size_of, sums_text, write_all
from gemcut.checkpoint.gather import check_edits, edited, is_identity, new_buffer, pieces
from gemcut.checkpoint.header import MAX_HEADER_BYTES, Header, lay_out
from gemcut.checkpoint.ledger import Ledger
from gemcut.checkpoint.read import CONFIG, INDEX, Checkpoint, Progress, open_checkpoint
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


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    sources: tuple[TensorRef, ...]  # tensors that stay, in byte order
    header: Header | None  # None: the shard is not touched
    omitted: tuple[TensorRef, ...]


def write_checkpoint(
    base: Checkpoint,
    edits: Edits,
    config: Mapping[str, Json],
    out: Path,
    *,
    force: bool = False,
    link: bool = True,
    progress: Progress | None = None,
) -> WriteReport:
    """Write `base` with `edits` and `config` to the folder `out`.

    The base's shard split, tensor order and header metadata are kept. Shards without an edit are hard-linked (`link`)
    or copied; every other file is copied byte for byte; config.json and the index are patched only where they change.
    While shards are written, threads read them back, hash them and compare them with the base: the manifest is made
    of that. `out` appears whole or not at all. Memory does not grow with the tensors.

    Raises:
        UsageError: `out` exists without `force`, or is the base itself, inside it or around it.
        MissingError: the disk is full or too small.
        CheckpointError: the edits do not fit, or what was written does not read back as meant.
    """
    check_edits(base.tensors, edits)
    _refuse_overlap(base.path, out)
    refuse_existing(out, force=force)
    shards = [shard for name in base.shards if (shard := _shard(name, base, edits)).sources]
    others = [f for f in list_files(base.path) if f not in base.shards and f not in (CONFIG, INDEX)]
    link = link and _same_device(base.path, out)
    written = [shard for shard in shards if shard.header is not None or not link]
    size_bytes = sum(_size(base, shard) for shard in written)
    need_disk(out, size_bytes + size_of(base.path, others) + _SPARE_BYTES)
    linked: list[str] = []
    with atomic_folder(out, force=force) as folder, Ledger() as ledger, _Flusher() as flusher:
        job = _Job(base, edits, folder, ledger, flusher, progress, size_bytes)
        for shard in shards:
            if shard.header is not None:
                job.write(shard)
            elif link and link_file(base.path / shard.name, folder / shard.name):
                linked.append(shard.name)
                job.compare_untouched(shard)
            else:
                job.copy(shard)
        for name in base.shards.keys() - {shard.name for shard in shards}:
            for ref in base.shards[name].tensors:
                ledger.compare(Stored(base.path / name, ref), None)
        for name in others:
            copy_file(base.path / name, folder / name)
        _write_config(base, config, folder)
        _write_index(base, shards, folder)
        manifest = _read_back(base, shards, folder, ledger, progress)
        save_manifest(manifest, folder / MANIFEST)
        sums = {**manifest.files, MANIFEST: sha256_file(folder / MANIFEST)}
        write_bytes(folder / SUMS, sums_text(sums).encode())
        flusher.wait()
        for parent in {(folder / name).parent for name in others}:
            fsync_folder(parent)
    return WriteReport(
        manifest=manifest,
        edited=tuple(shard.name for shard in shards if shard.header is not None),
        linked=tuple(linked),
        copied=tuple(shard.name for shard in shards if shard.header is None and shard.name not in linked),
        size_bytes_written=sum(_size(base, shard) for shard in shards if shard.name not in linked),
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


def _shard(name: str, base: Checkpoint, edits: Edits) -> _Shard:
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
    if all(is_identity(ref, edits.get(ref.name)) for ref in header.tensors):
        return _Shard(name, header.tensors, None, ())
    laid = lay_out(name, new, header.metadata)
    if len(laid.raw) > MAX_HEADER_BYTES:
        raise CheckpointError("the new header would be too large", where=name, got=f"{len(laid.raw)} bytes")
    return _Shard(name, tuple(kept), laid, tuple(omitted))


def _size(base: Checkpoint, shard: _Shard) -> int:
    return (shard.header or base.shards[shard.name]).size_bytes


class _Flusher:
    """fsyncs finished shards in the background, so that the disk works while the next shard is gathered."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def add(self, fd: int) -> None:
        """Take over an open file: fsync it, close it."""
        self._waiting.append(self._pool.submit(self._flush, fd))

    def nudge(self, fd: int) -> None:
        """Start writing out what is there of a file that still grows; skipped while the disk is busy anyway."""
        if not self._waiting or self._waiting[-1].done():
            self._waiting.append(self._pool.submit(os.fdatasync, fd))

    def wait(self) -> None:
        """Return when everything is on the disk."""
        for future in self._waiting:
            future.result()

    @staticmethod
    def _flush(fd: int) -> None:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(slots=True)
class _Job:
    """One run of the writer: where from, where to, and how far."""

    base: Checkpoint
    edits: Edits
    folder: Path
    ledger: Ledger
    flusher: _Flusher
    progress: Progress | None
    total: int
    done: int = 0

    def write(self, shard: _Shard) -> None:
        """Gather one shard's tensors into a new file; threads read back what is written."""
        assert shard.header is not None
        source, target = self.base.path / shard.name, self.folder / shard.name
        buffer = new_buffer()
        # O_EXCL: a new file, never the inode of a linked one
        fd_out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fd_in = os.open(source, os.O_RDONLY)
            try:
                write_all(fd_out, memoryview(len(shard.header.raw).to_bytes(8, "little") + shard.header.raw))
                for ref, new in zip(shard.sources, shard.header.tensors, strict=True):
                    edit = self.edits.get(ref.name)
                    for piece in pieces(fd_in, ref, edit, buffer):
                        write_all(fd_out, piece)
                        self._tick(len(piece), shard.name)
                        if self.done // _NUDGE_BYTES > (self.done - len(piece)) // _NUDGE_BYTES:
                            self.flusher.nudge(fd_out)
                    if new.name == ref.name:
                        self.ledger.compare(Stored(source, ref), Stored(target, new), edit)
                    else:
                        self.ledger.compare(Stored(source, ref), None)
                        self.ledger.compare(None, Stored(target, new))
                    self.ledger.hash_file(target, shard.name, new.stop)
            finally:
                os.close(fd_in)
            for ref in shard.omitted:
                self.ledger.compare(Stored(source, ref), None)
            self.ledger.hash_file(target, shard.name, shard.header.size_bytes)
        finally:
            self.flusher.add(fd_out)  # closes it, after what it is doing with it

    def copy(self, shard: _Shard) -> None:
        """Copy a shard that no edit touches."""
        copy_file(self.base.path / shard.name, self.folder / shard.name, sync=False)
        self._tick(_size(self.base, shard), shard.name)
        self.flusher.add(os.open(self.folder / shard.name, os.O_RDONLY))
        self.compare_untouched(shard)

    def compare_untouched(self, shard: _Shard) -> None:
        """Linked or copied: its bytes are read and hashed all the same."""
        path = self.folder / shard.name
        for ref in shard.sources:
            self.ledger.compare(Stored(self.base.path / shard.name, ref), Stored(path, ref))
        self.ledger.hash_file(path, shard.name, path.stat().st_size)

    def _tick(self, size: int, label: str) -> None:
        self.done += size
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, label)


def _write_config(base: Checkpoint, config: Mapping[str, Json], folder: Path) -> None:
    if not config_changes(base.config, config):
        copy_file(base.path / CONFIG, folder / CONFIG)
        return
    ascii_only = (base.path / CONFIG).read_bytes().isascii()
    text = json.dumps(dict(config), indent=2, allow_nan=False, ensure_ascii=ascii_only)
    write_bytes(folder / CONFIG, (text + "\n").encode())


def _write_index(base: Checkpoint, shards: list[_Shard], folder: Path) -> None:
    """The index last: same order and metadata keys; total_size and total_parameters follow the tensors."""
    if base.index is None:
        return
    where: dict[str, str] = {}
    size_bytes = elements = 0
    for shard in shards:
        after = shard.header.tensors if shard.header is not None else shard.sources
        for ref, new in zip(shard.sources, after, strict=True):
            where[ref.name] = new.name
            size_bytes += new.size_bytes
            elements += new.elements
    weight_map = base.index["weight_map"]
    assert isinstance(weight_map, dict)
    new_map = {where[name]: shard for name, shard in weight_map.items() if name in where}
    if new_map == weight_map and size_bytes == base.size_bytes:
        copy_file(base.path / INDEX, folder / INDEX)
        return
    index = dict(base.index)
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = size_bytes
    parameters = metadata.get("total_parameters")
    if isinstance(parameters, int):
        metadata["total_parameters"] = parameters - sum(r.elements for r in base.tensors.values()) + elements
    index["metadata"] = metadata
    index["weight_map"] = new_map
    write_bytes(folder / INDEX, (json.dumps(index, indent=2, allow_nan=False) + "\n").encode())


def _read_back(
    base: Checkpoint, shards: list[_Shard], folder: Path, ledger: Ledger, progress: Progress | None
) -> Manifest:
    try:
        _ = base.family
        known = True
    except UsageError:
        known = False
    written = open_checkpoint(folder, base.name, any_architecture=not known)
    for shard in shards:
        if shard.header is not None and written.shards[shard.name].tensors != shard.header.tensors:
            raise CheckpointError("the written header reads back differently", where=shard.name)
    for name in list_files(folder):
        if name not in written.shards:
            ledger.hash_file(folder / name, name, (folder / name).stat().st_size)
    facts, files = ledger.finish(progress)
    order = {name: i for i, name in enumerate(base.tensors)}
    facts = tuple(sorted(facts, key=lambda fact: order.get(fact.name, len(order))))
    return make_manifest(base, written, facts, files)
