"""safetensors → GGUF: the source is read once, piece by piece, for as many files as are wanted.

A piece is a run of rows of one tensor: read, hashed, turned into float32, then stored by each file in its own type.
Pieces go to threads; rows are quantised apart from one another, so their number changes no byte. Memory is a few MiB a
thread, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from gemcut.checkpoint import Checkpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix.blocks import quantise_blocks
from gemcut.export.output import Earlier, Output, bytes_to_write, finished, opened, payload_hash, refuse_others
from gemcut.export.record import Fact, earlier_records
from gemcut.export.source import Buffers, Loaded, Piece, Source, source_hash
from gemcut.export.targets import Planned, blocks_of, count_types, importance_of, units
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.library import Library, load
from gemcut.ggml.quantise import quantise
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.store import disk_errors, need_disk

Progress = Callable[[int, int, str], None]
_AHEAD = 3  # pieces in flight a thread: enough that none waits for the next read
SPARE_BYTES = 16 << 20  # records, journals, and what the file system keeps for itself

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file as written. Counts are of tensors; `found`: the very file was there already."""

    name: str
    parts: tuple[str, ...]
    size_bytes: int
    bits_per_weight: float
    types: Mapping[str, int]
    quantised: int
    copied: int
    resumed: int
    found: bool


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did. kernel_seconds: processor time inside the quantisers."""

    files: tuple[FileReport, ...]
    read_bytes: int
    seconds: float
    kernel_seconds: float
    threads: int


@dataclass(frozen=True, slots=True)
class _Settings:
    threads: int
    force: bool
    progress: Progress | None


@dataclass(slots=True, eq=False)
class _Group:
    """Outputs that want the same bytes of a tensor: they are made once."""

    kind: GgmlType
    importance: str
    outputs: list[Output]
    row_bytes: int
    payload: list[bytes] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Work:
    """A tensor on its way: which groups still need it, and the digests of the pieces done so far."""

    source: Source
    groups: list[_Group]
    left: int
    digests: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Done:
    digest: bytes
    payloads: tuple[bytes, ...]
    kernel_seconds: float


def export_gguf(
    checkpoint: Checkpoint,
    layout: GgufLayout,
    planned: Sequence[Planned],
    out: Path,
    *,
    threads: int = 1,
    force: bool = False,
    library: Library | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write all planned files into the folder `out`.

    A file that is there already, with the same settings, is left alone; tensors that a broken-off run has finished
    stay; and tensors that an earlier export in `out` holds with the same source, type, importances and quantiser are
    copied. Each of them is held against its hash first, and what is damaged is written again.

    Args:
        planned: of this checkpoint and layout, made by `plan_target` with `library.identity`.
        threads: that read and quantise.
    Raises:
        UsageError: another file has the name of a target, and not `force`.
        MissingError: the disk is full or too small.
        CheckpointError: a weight is not finite or cannot be stored, or what was written does not read back.
    """
    began = time.perf_counter()
    library = load() if library is None else library
    names = [one.target.name for one in planned]
    if len(set(names)) != len(names):
        raise UsageError("two targets have one name", got=", ".join(names))
    if out.exists() and not out.is_dir():
        raise UsageError("the output is a file, not a folder", where=str(out), hint="choose another -o")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        reports, run = _export(checkpoint, layout, planned, out, library, _Settings(max(1, threads), force, progress))
    return ExportReport(
        files=tuple(reports[name] for name in names),
        read_bytes=run.read_bytes,
        seconds=time.perf_counter() - began,
        kernel_seconds=run.kernel_seconds,
        threads=threads,
    )


def _export(
    checkpoint: Checkpoint,
    layout: GgufLayout,
    planned: Sequence[Planned],
    out: Path,
    library: Library,
    settings: _Settings,
) -> tuple[dict[str, FileReport], _Run]:
    force = settings.force
    parent, quantiser = checkpoint.fingerprint, library.identity
    asked = () if force else planned
    there = finished(asked, out, parent, quantiser, threads=settings.threads, progress=settings.progress)
    todo = [one for one in planned if one not in there]
    for one in () if force else todo:
        refuse_others(one, out)
    need_disk(out, sum(bytes_to_write(one, out, force=True) for one in todo) + SPARE_BYTES)
    sources = _sources(checkpoint, layout)
    run = _Run(library, settings.threads, settings.progress, sum(source.size_bytes for source in sources))
    reports = {one.target.name: _report(one, found=True) for one in there}
    if todo:
        earlier = Earlier(out, list(earlier_records(out)), quantiser)
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(opened(one, out, parent, quantiser)) for one in todo]
            run.all(sources, outputs, earlier)
        reports |= {output.planned.target.name: _report(output.planned, output) for output in outputs}
    return reports, run


def _sources(checkpoint: Checkpoint, layout: GgufLayout) -> list[Source]:
    buffers = Buffers()
    return sorted((Source(checkpoint, tensor, buffers) for tensor in layout.tensors), key=lambda source: source.place)


def _report(planned: Planned, output: Output | None = None, *, found: bool = False) -> FileReport:
    names = list(planned.importance)
    copied = len(output.copied) if output is not None else 0
    resumed = len(output.resumed) if output is not None else 0
    return FileReport(
        name=planned.target.name,
        parts=tuple(part.name for part in planned.parts),
        size_bytes=planned.size_bytes,
        bits_per_weight=planned.bits_per_weight,
        types=count_types(planned.target.types, names),
        quantised=0 if found else len(names) - copied - resumed,
        copied=copied,
        resumed=resumed,
        found=found,
    )


class _Run:
    """Pieces through threads. Bookkeeping is done by the calling thread alone, in the order of submission."""

    def __init__(self, library: Library, threads: int, progress: Progress | None, total: int) -> None:
        self.kernel_seconds = 0.0
        self.read_bytes = 0
        self._library = library
        self._threads = threads
        self._progress = progress
        self._total = total
        self._done = 0
        self._scratch = threading.local()

    def all(self, sources: Sequence[Source], outputs: Sequence[Output], earlier: Earlier) -> None:
        """Every tensor into every output."""
        flying: deque[tuple[_Work, Piece, Future[_Done]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for source in sources:
                    work = self._prepare(source, outputs, earlier, pool)
                    if work is None:
                        continue
                    for piece in source.pieces():
                        while len(flying) >= self._threads * _AHEAD:
                            self._land(*flying.popleft())
                        flying.append((work, piece, pool.submit(self._piece, work, piece)))
                while flying:
                    self._land(*flying.popleft())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _prepare(
        self, source: Source, outputs: Sequence[Output], earlier: Earlier, pool: ThreadPoolExecutor
    ) -> _Work | None:
        """Group the outputs by what they want, and take what is there already; None where nothing is left to do."""
        name = source.tensor.name
        groups: dict[tuple[GgmlType, str], _Group] = {}
        for output in outputs:
            kind, importance = output.planned.target.types[name], output.planned.importance[name]
            row_bytes = tensor_bytes(kind, (source.columns,))
            groups.setdefault((kind, importance), _Group(kind, importance, [], row_bytes)).outputs.append(output)
        pieces = list(source.pieces())
        known = any(name in output.journal.facts for output in outputs) or any(
            earlier.may_have(name, kind.name, importance) for kind, importance in groups
        )
        left = list(groups.values())
        if known and pieces:
            digest = source_hash(list(pool.map(source.hash, pieces)))
            left = [group for group in left if not _take(group, name, digest, pieces, earlier, pool)]
        if not left:
            self._advance(source, Piece(0, source.rows))
            return None
        return _Work(source, left, len(pieces))

    def _piece(self, work: _Work, piece: Piece) -> _Done:
        loaded = work.source.load(piece)
        kernel, payloads = 0.0, []
        for group in work.groups:
            began = time.thread_time()
            data = self._stored(work.source, piece, loaded, group)
            kernel += time.thread_time() - began
            for output in group.outputs:
                output.write(work.source.tensor.name, piece.first * group.row_bytes, data)
            payloads.append(blake3(data).digest())
        return _Done(loaded.digest, tuple(payloads), kernel)

    def _stored(self, source: Source, piece: Piece, loaded: Loaded, group: _Group) -> memoryview:
        """The piece in the group's type: as it is on disk where that is the type, else by the quantiser."""
        if loaded.raw is not None and loaded.dtype == group.kind.name:
            return loaded.raw.data
        if group.kind is GgmlType.F32:
            return loaded.values.view(np.uint8).data
        rows = piece.stop - piece.first
        out = self._room(rows * group.row_bytes)
        target, name = group.outputs[0].planned.target, source.tensor.source or source.tensor.name
        for first, stop, unit in _runs(source, piece, apart=bool(group.importance)):
            importance = importance_of(target, source.tensor, unit) if group.importance else None
            room = out[first * group.row_bytes : stop * group.row_bytes]
            picked = None if importance is None else blocks_of(target, source.tensor, unit)
            if picked is not None:
                quantise_blocks(loaded.values[first:stop], group.kind, picked, room, name=name, library=self._library)
            else:
                quantise(loaded.values[first:stop], group.kind, importance, room, name=name, library=self._library)
        return out.data

    def _room(self, size: int) -> NDArray[np.uint8]:
        held: NDArray[np.uint8] | None = getattr(self._scratch, "held", None)
        if held is None or len(held) < size:
            held = self._scratch.held = np.empty(size, np.uint8)
        return held[:size]

    def _land(self, work: _Work, piece: Piece, future: Future[_Done]) -> None:
        done = future.result()
        self.kernel_seconds += done.kernel_seconds
        work.digests.append(done.digest)
        for group, payload in zip(work.groups, done.payloads, strict=True):
            group.payload.append(payload)
        work.left -= 1
        if work.left == 0:
            source = source_hash(work.digests)
            for group in work.groups:
                payload_hex = payload_hash(group.payload)
                fact = Fact(work.source.tensor.name, group.kind.name, source, group.importance, payload_hex)
                for output in group.outputs:
                    output.add(fact)
        self._advance(work.source, piece)

    def _advance(self, source: Source, piece: Piece) -> None:
        """Count what the piece was on disk, where a tensor may have fewer rows and columns than in the file."""
        size, rows = source.size_bytes, max(source.rows, 1)
        size = size * piece.stop // rows - size * piece.first // rows
        self.read_bytes += size
        self._done += size
        if size and self._progress is not None:
            self._progress(self._done, self._total, "quantise")


def _runs(source: Source, piece: Piece, *, apart: bool) -> Iterator[tuple[int, int, int]]:
    """Rows of a piece, counted from its first, cut where one unit ends and the next begins."""
    if not apart or units(source.tensor) == 1:
        yield 0, piece.stop - piece.first, 0
        return
    height = source.tensor.shape[-2]
    at = piece.first
    while at < piece.stop:
        stop = min(piece.stop, (at // height + 1) * height)
        yield at - piece.first, stop - piece.first, at // height
        at = stop


def _take(
    group: _Group, name: str, source: str, pieces: Sequence[Piece], earlier: Earlier, pool: ThreadPoolExecutor
) -> bool:
    """Serve a group from the broken-off run or an earlier export; False where outputs are left to be quantised."""
    group.outputs = [one for one in group.outputs if not one.resume(name, source, pieces, group.row_bytes)]
    if not group.outputs:
        return True
    size_bytes = pieces[-1].stop * group.row_bytes
    found = earlier.payload(name, group.kind.name, group.importance, source, size_bytes, pool)
    if found is None:
        return False
    file, payload = found
    for piece in pieces:
        start, stop = piece.first * group.row_bytes, piece.stop * group.row_bytes
        data = file.read_range(name, start, stop).data
        for output in group.outputs:
            output.write(name, start, data)
    for output in group.outputs:
        output.copied.add(name)
        output.add(Fact(name, group.kind.name, source, group.importance, payload))
    return True
