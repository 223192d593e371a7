"""Write GGUF: every offset is known before the first payload byte, and the header is written last.

A killed run leaves `NAME.gguf.partial`, whose first bytes are zeros; no reader takes it for a model.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gguf import Value
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.gguf_file.cursor import MAX_HEADER_BYTES, SCALARS
from gemcut.gguf_file.header import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARRAY,
    KINDS,
    MAGIC,
    MAX_AXES,
    MAX_NAME_BYTES,
    SPLIT_COUNT,
    SPLIT_NO,
    SPLIT_TENSORS,
    VERSION,
    GgufRef,
    part_name,
    read_gguf,
)
from gemcut.store import PARTIAL, atomic_file, disk_errors

Entry = tuple[str, GgmlType, tuple[int, ...]]
"""Name, type and shape, rows first."""

_STRING = KINDS.index("str")
_MAX_PARTS = 65535


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One file before its payload: where everything will lie. `header` is all bytes up to `data_start`, padded."""

    name: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufRef]
    alignment: int
    header: bytes
    data_start: int
    size_bytes: int


def lay_out(
    metadata: Mapping[str, Value],
    tensors: Sequence[Entry],
    alignment: int | None = None,
    *,
    name: str = "model.gguf",
) -> Layout:
    """Offsets and header of a file with these pairs and tensors, in this order.

    Byte for byte what gguf-py and llama.cpp write for the same pairs and tensors. `alignment` other than 32 is said in
    the metadata; None takes what the metadata says.

    Raises:
        UsageError: a value that its type cannot hold, a name that no reader takes, columns that do not fit the type.
        CheckpointError: a text that is no Unicode.
    """
    said = metadata.get(ALIGNMENT_KEY)
    alignment = alignment or (said.value if said is not None and isinstance(said.value, int) else ALIGNMENT)
    if alignment & (alignment - 1):
        raise UsageError("the alignment is not a power of two", got=alignment)
    if alignment != ALIGNMENT or said is not None:
        metadata = {**metadata, ALIGNMENT_KEY: Value("u32", alignment)}
    if len({entry[0] for entry in tensors}) != len(tensors):
        raise UsageError("two tensors have one name", where=name)
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _text(key) + _pair(key, value)
    sizes: list[tuple[Entry, int, int]] = []
    at = 0
    for entry in tensors:
        size = _size(entry)
        sizes.append((entry, at, size))
        head += _entry(entry, at)
        at += size + -size % alignment
    data_start = len(head) + -len(head) % alignment
    if data_start > MAX_HEADER_BYTES:
        raise UsageError("the header would be too large", where=name, got=f"{data_start} bytes")
    refs = {
        entry[0]: GgufRef(entry[0], entry[1], entry[2], data_start + start, size, name) for entry, start, size in sizes
    }
    header = bytes(head) + bytes(data_start - len(head))
    return Layout(name, dict(metadata), refs, alignment, header, data_start, data_start + at)


def lay_out_split(
    metadata: Mapping[str, Value], tensors: Sequence[Entry], max_shard_bytes: int | None, *, name: str
) -> tuple[Layout, ...]:
    """One layout, or as many parts as keep each part's payload within `max_shard_bytes`.

    The first part has all metadata, the others only the split.* keys; a tensor larger than the limit has a part of its
    own. `name` ends in .gguf; parts get -00001-of-0000N before it.
    """
    alignment = metadata.get(ALIGNMENT_KEY, Value("u32", ALIGNMENT)).value
    assert isinstance(alignment, int)
    groups: list[list[Entry]] = [[]]
    held = 0
    for entry in tensors:
        size = _size(entry)
        size += -size % alignment
        if max_shard_bytes is not None and groups[-1] and held + size > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    if len(groups) == 1:
        return (lay_out(metadata, tensors, name=name),)
    if len(groups) > _MAX_PARTS:
        raise UsageError(
            "too many parts", got=len(groups), wanted=f"at most {_MAX_PARTS}", hint="a larger size per part"
        )
    split = {SPLIT_COUNT: Value("u16", len(groups)), SPLIT_TENSORS: Value("i32", len(tensors))}
    parts = []
    for number, group in enumerate(groups):
        pairs = {**(metadata if number == 0 else {}), SPLIT_NO: Value("u16", number), **split}
        part = part_name(name.removesuffix(".gguf"), number + 1, len(groups))
        parts.append(lay_out(pairs, group, alignment, name=part))
    return tuple(parts)


def _size(entry: Entry) -> int:
    name, kind, shape = entry
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES or len(shape) > MAX_AXES or any(dim < 0 for dim in shape):
        raise UsageError("GGUF cannot hold this tensor", where=name[:120], got=list(shape), wanted="63 bytes, 4 axes")
    try:
        return tensor_bytes(kind, shape)
    except UsageError as error:
        raise UsageError(error.what, where=name, got=error.got, wanted=error.wanted) from None


def _entry(entry: Entry, offset: int) -> bytes:
    name, kind, shape = entry
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), int(kind), offset)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pair(key: str, value: Value) -> bytes:
    code = KINDS.index(value.kind)
    many = isinstance(value.value, tuple)
    members = value.value if isinstance(value.value, tuple) else (value.value,)
    head = struct.pack("<IIQ", ARRAY, code, len(members)) if many else struct.pack("<I", code)
    try:
        if code == _STRING:
            if not all(isinstance(one, str) for one in members):
                raise TypeError("not a string")
            return head + b"".join([_text(str(one)) for one in members])
        form = "?" if value.kind == "bool" else SCALARS[value.kind]
        return head + struct.pack(f"<{len(members)}{form}", *members)
    except UnicodeEncodeError as error:  # JSON can say half of a surrogate pair
        raise CheckpointError("a metadata text is no Unicode", where=key, got=ascii(error.object)[:80]) from None
    except (struct.error, OverflowError, TypeError) as error:
        raise UsageError(f"a metadata value does not fit its type: {error}", where=key, wanted=value.kind) from None


# ---------------------------------------------------------------- writing


class GgufWriter:
    """Payload at its place, in any order and from any thread. Made by `gguf_writer`."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self.layout = layout
        self._fd = fd
        self._lock = threading.Lock()
        self._missing = {ref.name: ref.size_bytes for ref in layout.tensors.values()}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Bytes of a tensor, from its byte `offset` on. No byte is to be written twice."""
        ref = self.layout.tensors[name]
        data = data.cast("B")
        if not 0 <= offset <= offset + len(data) <= ref.size_bytes:
            raise CheckpointError("a write outside the tensor", where=name, got=f"{offset}+{len(data)}")
        self.mark(name, len(data))
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], ref.start + offset + done)

    def mark(self, name: str, size_bytes: int) -> None:
        """So many bytes of a tensor are in place (from an earlier, broken-off run)."""
        with self._lock:
            self._missing[name] -= size_bytes

    def read_into(self, name: str, offset: int, view: memoryview) -> bool:
        """Bytes of a tensor that are in the file now; False where the file is shorter."""
        start, done = self.layout.tensors[name].start + offset, 0
        while done < len(view):
            n = os.preadv(self._fd, [view[done:]], start + done)
            if n == 0:
                return False
            done += n
        return True

    def finish(self, path: Path) -> None:
        """Refuse a missing byte; header, then, when all is on the disk, the magic; read back."""
        wrong = next((name for name, left in self._missing.items() if left), None)
        if wrong is not None:
            raise CheckpointError("not every byte of a tensor was written", where=wrong, got=self._missing[wrong])
        header, alignment = self.layout.header, self.layout.alignment
        for ref in self.layout.tensors.values():  # what an earlier run left between two tensors
            stop = ref.start + ref.size_bytes
            _pwrite_all(self._fd, bytes(-ref.size_bytes % alignment), stop)
        os.fsync(self._fd)
        _pwrite_all(self._fd, header[len(MAGIC) :], len(MAGIC))
        os.fsync(self._fd)
        _pwrite_all(self._fd, MAGIC, 0)
        os.fsync(self._fd)
        found = read_gguf(path)
        same = [(r.name, r.kind, r.shape, r.start) for r in found.tensors.values()] == [
            (r.name, r.kind, r.shape, r.start) for r in self.layout.tensors.values()
        ]
        if not same or list(found.metadata) != list(self.layout.metadata) or found.size_bytes != self.layout.size_bytes:
            raise CheckpointError("the written header reads back differently", where=path.name)


def _reserve(fd: int, size_bytes: int) -> None:
    """A file of this size whose blocks are the file's own, where the file system can promise that."""
    os.ftruncate(fd, size_bytes)
    if hasattr(os, "posix_fallocate") and size_bytes:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _pwrite_all(fd: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)


@contextlib.contextmanager
def gguf_writer(path: Path, layout: Layout, *, keep_partial: bool = False) -> Iterator[GgufWriter]:
    """A file that appears under its name when the block ends and every payload byte was written; never before.

    Its disk space is reserved at once. `keep_partial`: on an error, and from a run that broke off, `path.partial` stays
    with its payload; its header is zeros.

    Raises:
        MissingError: the disk is full or cannot be written.
        CheckpointError: a tensor is not complete, or the header does not read back.
    """
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not keep_partial:
            partial.unlink(missing_ok=True)
        partial.touch()
    with atomic_file(path, "r+b", keep_partial=keep_partial) as f:
        fd = f.fileno()
        held = os.fstat(fd).st_size
        _pwrite_all(fd, bytes(min(layout.data_start, held)), 0)
        try:
            _reserve(fd, layout.size_bytes)
        except OSError:
            os.ftruncate(fd, min(held, layout.size_bytes))  # what cannot be finished shall not fill the disk
            raise
        writer = GgufWriter(fd, layout)
        yield writer
        writer.finish(partial)
