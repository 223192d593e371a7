"""The files of one target while they are written: payload to its place, what an earlier run left, then the record."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from gemcut.errors import GemcutError
from gemcut.export.record import JOURNAL, Fact, Journal, Record, journalled, load_record, record_path
from gemcut.export.source import Piece, pieces_of
from gemcut.export.targets import Planned
from gemcut.ggml.types import tensor_bytes
from gemcut.gguf_file import GgufFile, GgufWriter, gguf_writer, open_gguf
from gemcut.store import PARTIAL, refuse_existing, write_json

Progress = Callable[[int, int, str], None]

log = logging.getLogger(__name__)


class Output:
    """One target on its way to the disk. Made by `opened`; `write` may be called from any thread."""

    def __init__(self, planned: Planned, journal: Journal, writers: Sequence[GgufWriter]) -> None:
        self.planned = planned
        self.journal = journal
        self.resumed: set[str] = set()
        self.copied: set[str] = set()
        self._writer = {name: writer for writer in writers for name in writer.layout.tensors}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Payload bytes of a tensor."""
        self._writer[name].write(name, offset, data)

    def add(self, fact: Fact) -> None:
        """A tensor is complete."""
        self.journal.add(fact)

    def resume(self, name: str, source: str, pieces: Sequence[Piece], row_bytes: int) -> bool:
        """Whether the broken-off run has written this tensor from the same source; then it stays as it is."""
        fact = self.journal.facts.get(name)
        kind = self.planned.target.types[name].name
        if fact is None or (fact.kind, fact.source, fact.importance) != (kind, source, self.planned.importance[name]):
            return False
        writer, digests = self._writer[name], []
        for piece in pieces:
            view = memoryview(bytearray((piece.stop - piece.first) * row_bytes))
            if not writer.read_into(name, piece.first * row_bytes, view):
                return False
            digests.append(blake3(view).digest())
        if payload_hash(digests) != fact.payload:
            return False
        writer.mark(name, writer.layout.tensors[name].size_bytes)
        self.resumed.add(name)
        return True


@contextlib.contextmanager
def opened(planned: Planned, folder: Path, parent: str, quantiser: str) -> Iterator[Output]:
    """Write a target's files; they appear when the block ends, and the record after them.

    On an error, and on a kill, the partial files and the journal stay for the next run.
    """
    name = planned.target.name
    journal = Journal(folder / (name + JOURNAL), planned.settings)
    try:
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(gguf_writer(folder / part.name, part, keep_partial=True)) for part in planned.parts
            ]
            output = Output(planned, journal, writers)
            yield output
        _remember(planned, folder, parent, quantiser, journal.facts.values())
        journal.remove()
    finally:
        journal.close()


def _remember(planned: Planned, folder: Path, parent: str, quantiser: str, facts: Iterable[Fact]) -> None:
    by_name = {fact.name: fact for fact in facts}
    record = Record(
        file=planned.target.name,
        parts=tuple(part.name for part in planned.parts),
        size_bytes=planned.size_bytes,
        bits_per_weight=planned.bits_per_weight,
        settings=planned.settings,
        parent=parent,
        quantiser=quantiser,
        facts=tuple(by_name[name] for part in planned.parts for name in part.tensors),
    )
    write_json(record_path(folder, planned.target.name), record.to_json())


def finished(
    planned: Sequence[Planned],
    folder: Path,
    parent: str,
    quantiser: str,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Planned]:
    """Those that are there already, every tensor of them held against its hash; a record that a kill has prevented is
    written now. A damaged file is none of them."""
    there = [(one, facts) for one in planned if (facts := _facts_there(one, folder)) is not None]
    total, done, whole = sum(one.payload_bytes for one, _ in there), 0, []
    with ThreadPoolExecutor(threads) as pool:
        for one, facts in there:
            damaged = []
            file = open_gguf(folder / one.parts[0].name)
            for name, ref in file.tensors.items():
                if _payload(file, name, pool) != facts[name].payload:
                    damaged.append(name)
                done += ref.size_bytes
                if progress is not None:
                    progress(done, total, "check")
            if damaged:
                more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
                log.warning("%s is damaged in %s%s: it is written again", one.target.name, damaged[0], more)
                continue
            whole.append(one)
            if _recorded(one, folder) is None:
                _remember(one, folder, parent, quantiser, facts.values())
                (folder / (one.target.name + JOURNAL)).unlink(missing_ok=True)
    return whole


def _facts_there(planned: Planned, folder: Path) -> Mapping[str, Fact] | None:
    """What record or journal say of a target whose header is in place; None where it is not, or they say too little."""
    if any(not _same_header(folder / part.name, part.header, part.size_bytes) for part in planned.parts):
        return None
    facts = _facts(planned, folder)
    partial = any((folder / (part.name + PARTIAL)).exists() for part in planned.parts)
    return None if partial or facts.keys() != planned.importance.keys() else facts


def _facts(planned: Planned, folder: Path) -> Mapping[str, Fact]:
    """Of the record of these very settings, else of such a journal."""
    recorded = _recorded(planned, folder)
    return journalled(folder / (planned.target.name + JOURNAL), planned.settings) if recorded is None else recorded


def _recorded(planned: Planned, folder: Path) -> Mapping[str, Fact] | None:
    try:
        record = load_record(record_path(folder, planned.target.name))
    except GemcutError:
        return None
    return {fact.name: fact for fact in record.facts} if record.settings == planned.settings else None


def refuse_others(planned: Planned, folder: Path) -> None:
    """UsageError where another file has the name of a part; parts of this very target are written again, where a kill
    has left them without others of its parts, or damage has befallen them."""
    mine = [part for part in planned.parts if _same_header(folder / part.name, part.header, part.size_bytes)]
    again = mine if mine and _facts(planned, folder).keys() == planned.importance.keys() else []
    for part in planned.parts:
        if part not in again:
            refuse_existing(folder / part.name, force=False)


def bytes_to_write(planned: Planned, folder: Path, *, force: bool = False) -> int:
    """Disk space that a target still wants: nothing where it is there, less where a broken-off run has its room."""
    if not force and all(_same_header(folder / part.name, part.header, part.size_bytes) for part in planned.parts):
        return 0
    partials = [folder / (part.name + PARTIAL) for part in planned.parts]
    return max(0, planned.size_bytes - sum(path.stat().st_blocks * 512 for path in partials if path.exists()))


def _same_header(path: Path, header: bytes, size_bytes: int) -> bool:
    try:
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_size == size_bytes and f.read(len(header)) == header
    except OSError:
        return False


def payload_hash(digests: Sequence[bytes]) -> str:
    """One hash of a payload's pieces, in hex."""
    return blake3(b"".join(digests)).hexdigest()


def _payload(file: GgufFile, name: str, pool: ThreadPoolExecutor) -> str:
    """`payload_hash` of a tensor as it lies in a file; "" where the disk does not give it."""
    ref = file.tensors[name]
    row_bytes = tensor_bytes(ref.kind, ref.shape[-1:])

    def digest(piece: Piece) -> bytes:
        return blake3(file.read_range(name, piece.first * row_bytes, piece.stop * row_bytes).data).digest()

    try:
        return payload_hash(list(pool.map(digest, pieces_of(ref.shape))))
    except OSError:
        return ""


class Earlier:
    """Tensors of finished exports in a folder, found by type, source, importances and quantiser."""

    def __init__(self, folder: Path, records: Sequence[Record], quantiser: str) -> None:
        self._folder = folder
        self._files: dict[str, GgufFile | None] = {}
        self._found: dict[tuple[str, str, str], list[tuple[Record, Fact]]] = {}
        for record in records:
            if record.quantiser == quantiser:
                for fact in record.facts:
                    self._found.setdefault((fact.name, fact.kind, fact.importance), []).append((record, fact))

    def may_have(self, name: str, kind: str, importance: str) -> bool:
        """Whether it is worth while to hash the source before it is quantised."""
        return (name, kind, importance) in self._found

    def payload(
        self, name: str, kind: str, importance: str, source: str, size_bytes: int, pool: ThreadPoolExecutor
    ) -> tuple[GgufFile, str] | None:
        """A file that holds this tensor, its bytes held against their hash; None where none does."""
        for record, fact in self._found.get((name, kind, importance), ()):
            if fact.source != source:
                continue
            file = self._open(record)
            if file is None or name not in file.tensors or file.tensors[name].kind.name != kind:
                continue
            if file.tensors[name].size_bytes != size_bytes:
                continue
            if _payload(file, name, pool) == fact.payload:
                return file, fact.payload
            log.warning("%s in %s is not what its record says: it is quantised anew", name, record.file)
        return None

    def _open(self, record: Record) -> GgufFile | None:
        if record.file not in self._files:
            try:
                self._files[record.file] = open_gguf(self._folder / record.parts[0])
            except (GemcutError, OSError) as error:
                log.warning("%s cannot be used again: %s", record.file, error)
                self._files[record.file] = None
        return self._files[record.file]
