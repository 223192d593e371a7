"""Shards on their way: gathered from the base, written, read back by threads, flushed; hashed on both sides."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from gemcut.checkpoint.compare import Stored, gathered_fact, made_fact
from gemcut.checkpoint.folder import write_all
from gemcut.checkpoint.gather import new_buffer, pieces, pieces_seen
from gemcut.checkpoint.header import Header
from gemcut.checkpoint.ledger import Ledger
from gemcut.checkpoint.made import Made
from gemcut.checkpoint.read import Checkpoint, Progress
from gemcut.errors import CheckpointError
from gemcut.types import Edits, Take, TensorFact, TensorRef

_NUDGE_BYTES = 256 << 20
_DROP_BYTES = 64 << 20
_PROBES = 16
_ANNOUNCE_BYTES = 32 << 20  # the reader is told of new bytes this often


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of the new folder and where its tensors come from."""

    name: str
    sources: tuple[TensorRef, ...]  # tensors of the base that stay, in byte order
    header: Header  # as it will stand in the new file: what is made, then `kept`
    omitted: tuple[TensorRef, ...]
    touched: bool  # False: byte for byte the base's
    made: tuple[Made, ...] = ()

    @property
    def kept(self) -> tuple[TensorRef, ...]:
        """Where the tensors of the base lie in the new file; run with `sources`."""
        return self.header.tensors[sum(len(one.tensors) for one in self.made) :]


class Flusher:
    """fsyncs finished shards in the background, so that the disk works while the next shard is gathered."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> Flusher:
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


class _PassingThrough:
    """Gives back the page cache behind a read that passes through a file once.

    A checkpoint larger than memory would push out everything else, and getting fresh pages costs more than reading
    them. A file that is in memory already stays there.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._seen = 0
        self._active = hasattr(os, "posix_fadvise") and not _in_memory(fd, size_bytes)

    def seen(self, size: int) -> None:
        """So many more bytes were read."""
        before, self._seen = self._seen, self._seen + size
        if self._active and self._seen // _DROP_BYTES > before // _DROP_BYTES:
            os.posix_fadvise(self._fd, 0, max(0, self._seen - _DROP_BYTES), os.POSIX_FADV_DONTNEED)


def _in_memory(fd: int, size_bytes: int) -> bool:
    """Whether most of some places in the file can be read without waiting for the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte, found = bytearray(1), 0
    for k in range(_PROBES):
        try:
            found += os.preadv(fd, [byte], size_bytes * k // _PROBES, os.RWF_NOWAIT)
        except OSError:  # not in memory, or a file system that cannot say
            continue
    return found > _PROBES // 2


@dataclass(frozen=True, slots=True)
class _Gathered:
    """A tensor whose base was hashed while it was gathered."""

    old: TensorRef
    new: TensorRef
    edit: Take | None
    before: str  # BLAKE3 of the base's tensor
    meant: str  # BLAKE3 of the bytes given to the new file


@dataclass(slots=True)
class Transfer:
    """One run of the writer: where from, where to, and how far."""

    base: Checkpoint
    edits: Edits
    folder: Path
    ledger: Ledger
    flusher: Flusher
    progress: Progress | None
    total: int
    _done: int = 0
    _gathered: list[_Gathered] = field(default_factory=list)
    _made: list[tuple[TensorRef, str]] = field(default_factory=list)  # with BLAKE3 of the bytes that were given
    _buffer: memoryview = field(default_factory=new_buffer)

    def write(self, shard: Shard) -> None:
        """Gather one shard's tensors into a new file; threads read back what is written."""
        source, target = self.base.path / shard.name, self.folder / shard.name
        # O_EXCL: a new file, never the inode of a linked one
        fd_out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            header = shard.header
            fd_in = os.open(source, os.O_RDONLY)
            try:
                write_all(fd_out, memoryview(len(header.raw).to_bytes(8, "little") + header.raw))
                passing = _PassingThrough(fd_in, os.fstat(fd_in).st_size)
                places = iter(header.tensors)
                for one in shard.made:
                    self._fill(fd_out, shard, one, [next(places) for _ in one.tensors])
                for ref, new in zip(shard.sources, places, strict=True):
                    self._tensor(fd_in, fd_out, shard, ref, new, passing)
            finally:
                os.close(fd_in)
            places_of = {ref.name: ref for ref in header.tensors}
            for ref in shard.omitted:  # what is made may have the name of what it stands for
                after = Stored(target, places_of[ref.name]) if ref.name in places_of else None
                self.ledger.compare(Stored(source, ref), after)
            self.ledger.hash_file(target, shard.name, header.size_bytes, header.tensors)
        finally:
            self.flusher.add(fd_out)  # closes it, after what it is doing with it

    def _fill(self, fd_out: int, shard: Shard, made: Made, places: list[TensorRef]) -> None:
        left = [ref.size_bytes for ref in places]
        digests = [blake3() for _ in places]
        at = 0
        for piece in made.fill():
            self._put(fd_out, shard, piece)
            while piece:
                while at < len(left) and not left[at]:
                    at += 1
                if at == len(left):
                    raise CheckpointError("more bytes were made than the new tensors hold", where=places[-1].name)
                part, piece = piece[: left[at]], piece[left[at] :]
                digests[at].update(part)
                left[at] -= len(part)
        if any(left):
            raise CheckpointError("fewer bytes were made than the new tensors hold", where=places[0].name)
        self._made += [(ref, digest.hexdigest()) for ref, digest in zip(places, digests, strict=True)]

    def _tensor(
        self, fd_in: int, fd_out: int, shard: Shard, ref: TensorRef, new: TensorRef, passing: _PassingThrough
    ) -> None:
        edit = self.edits.get(ref.name)
        if edit is None or isinstance(edit, Take):
            before, meant = blake3(), blake3()

            def see(piece: memoryview) -> None:
                before.update(piece)
                passing.seen(len(piece))

            for piece in pieces_seen(fd_in, ref, edit, self._buffer, see):
                if edit is not None:
                    meant.update(piece)
                self._put(fd_out, shard, piece)
            digest = before.hexdigest()
            self._gathered.append(_Gathered(ref, new, edit, digest, digest if edit is None else meant.hexdigest()))
            return
        for piece in pieces(fd_in, ref, edit, self._buffer):
            self._put(fd_out, shard, piece)
        source, target = Stored(self.base.path / shard.name, ref), Stored(self.folder / shard.name, new)
        if new.name == ref.name:
            self.ledger.compare(source, target, edit)
        else:
            self.ledger.compare(source, None)
            self.ledger.compare(None, target)

    def _put(self, fd: int, shard: Shard, piece: memoryview) -> None:
        write_all(fd, piece)
        before, self._done = self._done, self._done + len(piece)
        if self._done // _ANNOUNCE_BYTES > before // _ANNOUNCE_BYTES:
            at = os.lseek(fd, 0, os.SEEK_CUR)
            self.ledger.hash_file(self.folder / shard.name, shard.name, at, shard.header.tensors)
            if self._done // _NUDGE_BYTES > before // _NUDGE_BYTES:
                self.flusher.nudge(fd)
        if self.progress is not None:
            self.progress(min(self._done, self.total), self.total, shard.name)

    def compare_linked(self, shard: Shard) -> None:
        """A linked shard is the base's own file; it is read and hashed all the same."""
        for ref in shard.sources:
            self.ledger.compare(Stored(self.base.path / shard.name, ref), Stored(self.folder / shard.name, ref))
        self.ledger.hash_file(self.folder / shard.name, shard.name, shard.header.size_bytes)

    def finish(self) -> tuple[tuple[TensorFact, ...], dict[str, str]]:
        """Every fact and the hash of every file, once all threads are done."""
        facts, files = self.ledger.finish(self.progress)
        read_back = self.ledger.tensor_hash
        mine = [
            gathered_fact(g.old, g.new, g.edit, g.before, g.meant, read_back(g.new.shard, g.new.name))
            for g in self._gathered
        ]
        compared = {fact.name for fact in facts}
        made = [made_fact(ref, meant, read_back(ref.shard, ref.name)) for ref, meant in self._made]
        return (*facts, *mine, *(fact for fact in made if fact.name not in compared)), files
