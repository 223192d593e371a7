"""The header of a GGUF file: parsed, every number in it checked against the file. No tensor byte is read.

Layout, little endian: `GGUF` · u32 version · u64 tensors · u64 pairs · pairs (key, type, value) · tensors (name, u32
axes, u64 sizes with the columns first, u32 type, u64 offset) · padding · payload, each tensor padded to the alignment.
Source: ggml/docs/gguf.md and ggml/src/gguf.cpp of llama.cpp b11549; what that reader refuses is refused here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gguf import ScalarKind, Value
from gemcut.ggml.types import BLOCKS, GgmlType
from gemcut.gguf_file.cursor import SCALARS, Cursor, shown

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_NAME_BYTES = 63  # ggml keeps 64 with the closing zero
MAX_AXES = 4
MAX_BYTES = 2**63 - 1
ARRAY = 9
KINDS: tuple[ScalarKind | None, ...] = (
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", None, "u64", "i64", "f64",
)  # fmt: skip
_MAX_KEY_BYTES = 65535
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GgufRef:
    """Where one tensor lies.   shape: rows first.   start: absolute in the file named `part`."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    start: int
    size_bytes: int
    part: str


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """A checked header, or the joined headers of a split file.

    metadata: in the order of the file; of a split file, the first part's, without the split.* keys.
    tensors: in the order of the file.   parts: file names, one where the file is whole.
    data_start: of the first part.   size_bytes: of all parts.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufRef]
    alignment: int
    data_start: int
    size_bytes: int
    parts: tuple[str, ...]

    def ref(self, name: str) -> GgufRef:
        """Where a tensor lies. CheckpointError where it does not exist."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError("the GGUF file has no such tensor", where=shown(name)) from None

    def read_range(self, name: str, start: int, stop: int) -> U8:
        """Payload bytes `start:stop`, counted from the tensor's first byte."""
        ref = self.ref(name)
        if not 0 <= start <= stop <= ref.size_bytes:
            raise CheckpointError(
                "a read outside the tensor", where=name, got=f"{start}:{stop}", wanted=f"0:{ref.size_bytes}"
            )
        out = np.empty(stop - start, np.uint8)
        view, done = out.data, 0
        fd = os.open(self.path.with_name(ref.part), os.O_RDONLY)
        try:
            while done < len(view):
                n = os.preadv(fd, [view[done:]], ref.start + start + done)
                if n == 0:
                    raise CheckpointError("the file ended before its tensors did", where=f"{name} in {ref.part}")
                done += n
        finally:
            os.close(fd)
        return out

    def read(self, name: str) -> U8:
        """A tensor's payload `[size_bytes]`."""
        return self.read_range(name, 0, self.ref(name).size_bytes)

    def value(self, key: str) -> int | float | bool | str | tuple[object, ...] | None:
        """A metadata value without its type; None where the key is absent."""
        found = self.metadata.get(key)
        return None if found is None else found.value


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of one file, be it whole or one part of a split one.

    Memory is bounded by what the header really holds, whatever it claims.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is not GGUF, is cut off, or any number in it is wrong.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would hang
            raise CheckpointError("not a regular file", where=path.name)
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UsageError(
            "there is no such GGUF file", where=str(path), hint="check the path; gemcut gguf MODEL -t Q4_K_M writes one"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read the GGUF file: {error.strerror}", where=path.name) from None
    try:
        return _parse(Cursor(fd, path.name), path)
    finally:
        os.close(fd)


def _parse(cursor: Cursor, path: Path) -> GgufFile:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        hint = "it was never finished" if magic == bytes(4) else None
        raise CheckpointError(
            "this is not a GGUF file", where=cursor.name, got=repr(magic), wanted="b'GGUF'", hint=hint
        )
    version = cursor.count("u32", "the version")
    if version not in (2, VERSION):
        swapped = version & 0xFFFF == 0
        cursor.bad("a big-endian GGUF file" if swapped else "unknown version of GGUF", got=version, wanted="2 or 3")
    tensors = cursor.count("u64", "the number of tensors")
    pairs = cursor.count("u64", "the number of metadata pairs")
    room = cursor.size_bytes - cursor.at
    if tensors * 24 > room or pairs * 13 > room:  # the least that an entry takes
        cursor.bad("the header counts more entries than the file can hold", got=f"{tensors} tensors, {pairs} pairs")
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = _key(cursor, metadata)
        metadata[key] = _value(cursor, key)
    alignment = _alignment(cursor, metadata)
    entries: dict[str, tuple[GgmlType, tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name, entry = _entry(cursor, entries)
        entries[name] = entry
    data_start = cursor.at + -cursor.at % alignment
    refs = _placed(cursor, entries, data_start, alignment)
    return GgufFile(
        path, MappingProxyType(metadata), MappingProxyType(refs), alignment, data_start, cursor.size_bytes, (path.name,)
    )


def _key(cursor: Cursor, seen: Mapping[str, Value]) -> str:
    key = cursor.text("a metadata key")
    if not 0 < len(key.encode()) <= _MAX_KEY_BYTES:
        cursor.bad("a metadata key is empty or too long", got=f"{len(key.encode())} bytes")
    if key in seen:
        cursor.bad("a metadata key is repeated", item=key)
    return key


def _value(cursor: Cursor, key: str) -> Value:
    what = f"the value of {shown(key)}"
    code = cursor.count("u32", what)
    if code != ARRAY:
        kind = _kind(cursor, code, key)
        return Value(kind, _scalars(cursor, kind, 1, key)[0])
    kind = _kind(cursor, cursor.count("u32", what), key)
    return Value(kind, _scalars(cursor, kind, cursor.count("u64", what), key))


def _kind(cursor: Cursor, code: int, key: str) -> ScalarKind:
    kind = KINDS[code] if code < len(KINDS) else None
    if kind is None:
        cursor.bad("an array of arrays" if code == ARRAY else "unknown type of a metadata value", got=code, item=key)
    return kind


def _scalars(
    cursor: Cursor, kind: ScalarKind, count: int, key: str
) -> tuple[int, ...] | tuple[float, ...] | tuple[bool, ...] | tuple[str, ...]:
    what = f"the value of {shown(key)}"
    if kind == "str":
        return tuple(cursor.texts(count, what))
    if kind == "bool":
        raw = cast(tuple[int, ...], cursor.numbers("u8", count, what))
        if any(one > 1 for one in raw):
            cursor.bad("a truth value is neither 0 nor 1", got=max(raw), item=key)
        return tuple(one == 1 for one in raw)
    assert kind in SCALARS
    return cursor.numbers(kind, count, what)


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    found = metadata.get(ALIGNMENT_KEY)
    if found is None:
        return ALIGNMENT
    value = found.value
    if found.kind != "u32" or not isinstance(value, int):
        cursor.bad("the alignment is not a u32", got=found.kind, item=ALIGNMENT_KEY)
    if value < 1 or value & (value - 1):
        cursor.bad("the alignment is not a power of two", got=value, item=ALIGNMENT_KEY)
    return value


def _entry(cursor: Cursor, seen: Mapping[str, object]) -> tuple[str, tuple[GgmlType, tuple[int, ...], int, int]]:
    name = cursor.text("a tensor name")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        cursor.bad("a tensor name is empty or too long", got=f"{len(name.encode())} bytes", item=name)
    if name in seen:
        cursor.bad("two tensors have one name", item=name)
    axes = cursor.count("u32", "a tensor")
    if axes > MAX_AXES:
        cursor.bad("too many axes", got=axes, wanted=f"at most {MAX_AXES}", item=name)
    shape = cast(tuple[int, ...], cursor.numbers("u64", axes, "a tensor"))[::-1]
    code = cursor.count("u32", "a tensor")
    offset = cursor.count("u64", "a tensor")
    try:
        kind = GgmlType(code)
    except ValueError:
        cursor.bad("unknown type of tensor", got=code, item=name)
    block = BLOCKS[kind]
    elements = 1
    for dim in shape:
        elements *= max(dim, 1)  # a later zero must not hide an overflow
        if dim > MAX_BYTES or elements > MAX_BYTES:
            cursor.bad("the shape overflows", got="×".join(str(d) for d in shape), item=name)
    columns = shape[-1] if shape else 1
    if columns % block.values:
        cursor.bad(
            f"rows do not fit the blocks of {kind.name}",
            f"{columns} columns",
            f"a multiple of {block.values}",
            item=name,
        )
    size = 0 if 0 in shape else elements // block.values * block.size_bytes
    if size > MAX_BYTES:
        cursor.bad("the shape overflows", got="×".join(str(d) for d in shape), item=name)
    return name, (kind, shape, offset, size)


def _placed(
    cursor: Cursor, entries: Mapping[str, tuple[GgmlType, tuple[int, ...], int, int]], data_start: int, alignment: int
) -> dict[str, GgufRef]:
    """The tensors one after the other, each padded, as the reference reader wants them; all inside the file."""
    refs: dict[str, GgufRef] = {}
    at = 0
    for name, (kind, shape, offset, size) in entries.items():
        if offset != at:
            cursor.bad("a tensor is not where the one before it ends", got=f"offset {offset}", wanted=at, item=name)
        if data_start + at + size > cursor.size_bytes:
            cursor.bad(
                "a tensor lies outside the file",
                got=f"{cursor.size_bytes} bytes",
                wanted=f"{data_start + at + size} or more",
                item=name,
            )
        refs[name] = GgufRef(name, kind, shape, data_start + at, size, cursor.name)
        at += size + -size % alignment
    return refs


# ---------------------------------------------------------------- split files


def part_name(stem: str, number: int, count: int) -> str:
    """File name of part `number` (from 1) of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def open_gguf(path: Path) -> GgufFile:
    """A whole file, or all parts of a split one, whichever part is named.

    Raises:
        UsageError: there is no such file.
        CheckpointError: as `read_gguf`; or a part is missing, repeated, or belongs to another file.
    """
    path = Path(path)
    first = read_gguf(path)
    count = _split_number(first, SPLIT_COUNT)
    if count <= 1:
        return first
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            "a part of a split file must keep its name", where=path.name, wanted=f"…-00001-of-{count:05d}.gguf"
        )
    metadata: Mapping[str, Value] = {}
    tensors: dict[str, GgufRef] = {}
    parts: list[GgufFile] = []
    for number in range(count):
        name = part_name(match[1], number + 1, count)
        part = first if name == path.name else _other_part(path.with_name(name))
        found = (_split_number(part, SPLIT_NO), _split_number(part, SPLIT_COUNT))
        if found != (number, count):
            raise CheckpointError(
                "a part says that it is another",
                where=name,
                got=f"part {found[0]} of {found[1]}",
                wanted=f"{number} of {count}",
            )
        if number == 0:
            split = {SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS}
            metadata = {key: value for key, value in part.metadata.items() if key not in split}
        for ref in part.tensors.values():
            if ref.name in tensors:
                raise CheckpointError("two parts hold one tensor", where=f"{shown(ref.name)} in {name}")
            tensors[ref.name] = ref
        parts.append(part)
    wanted = _split_number(parts[0], SPLIT_TENSORS)
    if wanted != len(tensors):
        raise CheckpointError("the parts do not hold all tensors", where=path.name, got=len(tensors), wanted=wanted)
    return GgufFile(
        parts[0].path,
        MappingProxyType(dict(metadata)),
        MappingProxyType(tensors),
        parts[0].alignment,
        parts[0].data_start,
        sum(part.size_bytes for part in parts),
        tuple(part.path.name for part in parts),
    )


def _split_number(part: GgufFile, key: str) -> int:
    found = part.metadata.get(key)
    if found is None:
        return 0
    if isinstance(found.value, bool) or not isinstance(found.value, int) or found.value < 0:
        raise CheckpointError("a key of a split file is not a number", where=f"{key} in {part.path.name}")
    return found.value


def _other_part(path: Path) -> GgufFile:
    if not path.exists():
        raise CheckpointError("a part of a split file is missing", where=path.name, hint="download the model again")
    return read_gguf(path)
