"""One safetensors header: parsed, every number in it checked against the file, and laid out again.

Layout: u64 little endian N · N bytes of JSON · tensor bytes. Offsets in the JSON count from the end of the JSON.
Source: safetensors, README "Format", and safetensors/src/tensor.rs at release 0.8.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gemcut.errors import CheckpointError
from gemcut.types import DTYPE_BYTES, Json, TensorRef

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
MAX_BYTES = 2**63 - 1
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in the order of their bytes, offsets absolute in the file."""

    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    data_start: int
    size_bytes: int  # of the whole file
    raw: bytes  # the JSON as it stands in the file, padding included


def parse_object(raw: bytes, what: str, where: str) -> dict[str, Json]:
    """A JSON object from outside: UTF-8, finite numbers, no repeated key, no lone surrogate.

    Raises:
        CheckpointError: it is anything else.
    """

    def once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [k for k, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:80]!r} is repeated")
        return out

    def finite(text: str) -> float:
        number = float(text)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"{text[:40]} is not a finite number")
        return number

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
        if "\\u" in text:  # an escape can spell half a surrogate pair, which no UTF-8 file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error).encode("ascii", "backslashreplace").decode()[:200]
        raise CheckpointError(f"{what} is not valid JSON: {reason}", where=where) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object", where=where, got=type(value).__name__)
    return value


def read_header(path: Path, shard: str) -> Header:
    """Read and check the header of one shard; no tensor byte is read.

    Raises:
        CheckpointError: the file is missing, is not a regular file, or any number in its header is wrong.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would hang
            raise CheckpointError("a shard is not a regular file", where=shard)
        with open(path, "rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            fits = len(prefix) == 8 and length <= min(MAX_HEADER_BYTES, info.st_size - 8)
            raw = f.read(length) if fits else b""
    except FileNotFoundError:
        raise CheckpointError("a shard is missing", where=shard, hint="download the model again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read a shard: {error.strerror}", where=shard) from None
    if len(prefix) < 8:
        raise CheckpointError("the file is too short to be safetensors", where=shard, got=f"{info.st_size} bytes")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            "the header is too large", where=shard, got=f"{length} bytes", wanted=f"at most {MAX_HEADER_BYTES}"
        )
    if len(raw) != length:
        raise CheckpointError(
            "the header is longer than the file",
            where=shard,
            got=f"a header of {length} bytes in a file of {info.st_size}",
            hint="the file is cut off, or is not safetensors",
        )
    return parse_header(raw, shard, info.st_size)


def parse_header(raw: bytes, shard: str, file_bytes: int) -> Header:
    """Check a header's JSON against the size of its file.

    Raises:
        CheckpointError: unknown dtype, bad shape, offsets that do not match it, overlap, hole, trailing bytes.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError("the header does not begin with {", where=shard, hint="is this a safetensors file?")
    entries = parse_object(raw, "the safetensors header", shard)
    metadata = _metadata(entries.pop("__metadata__", {}), shard)
    data_start = 8 + len(raw)
    data_bytes = file_bytes - data_start
    refs = sorted(
        (_entry(name, entry, shard, data_start, data_bytes) for name, entry in entries.items()),
        key=lambda ref: (ref.start, ref.stop, ref.name),
    )
    at = data_start
    for ref in refs:
        if ref.start != at:
            raise CheckpointError(
                "two tensors overlap" if ref.start < at else "there is a hole between two tensors",
                where=f"{_show(ref.name)} in {shard}",
                got=f"offset {ref.start - data_start}",
                wanted=f"{at - data_start}",
            )
        at = ref.stop
    if at != file_bytes:
        raise CheckpointError(
            "bytes follow the last tensor", where=shard, got=f"{file_bytes} bytes", wanted=f"{at} bytes"
        )
    return Header(tuple(refs), metadata, data_start, file_bytes, raw)


def _show(name: str) -> str:
    return name[:120].encode("ascii", "backslashreplace").decode()


def _metadata(value: Json, shard: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return {k: v for k, v in value.items() if isinstance(v, str)}
    raise CheckpointError("__metadata__ is not a map of strings", where=shard)


def _entry(name: str, entry: Json, shard: str, data_start: int, data_bytes: int) -> TensorRef:
    def bad(what: str, got: object = None, wanted: object = None) -> NoReturn:
        raise CheckpointError(what, where=f"{_show(name)} in {shard}", got=got, wanted=wanted)

    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        bad("a header entry is malformed", wanted="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        bad("unknown dtype", got=_show(repr(dtype)), wanted=", ".join(DTYPE_BYTES))
    if not isinstance(shape, list):
        bad("the shape is not a list")
    dims: list[int] = []
    span = DTYPE_BYTES[dtype]
    for dim in shape:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0 or dim > MAX_BYTES:
            bad("the shape holds something else than sizes", got=_show(repr(dim)))
        dims.append(dim)
        span *= dim
        if span > MAX_BYTES:
            bad("the shape overflows", got="×".join(str(d) for d in dims))
    if not isinstance(offsets, list) or len(offsets) != 2:
        bad("data_offsets is not a pair")
    start, stop = offsets
    if isinstance(start, bool) or isinstance(stop, bool) or not isinstance(start, int) or not isinstance(stop, int):
        bad("data_offsets is not a pair of integers")
    if not 0 <= start <= stop <= data_bytes:
        bad("the offsets lie outside the file", got=f"{str(start)[:24]}–{str(stop)[:24]}", wanted=f"0–{data_bytes}")
    if stop - start != span:
        bad("the shape and the offsets disagree", got=f"{stop - start} bytes", wanted=f"{span} for {dtype} {dims}")
    return TensorRef(name, dtype, tuple(dims), shard, data_start + start, data_start + stop)


def lay_out(shard: str, tensors: Sequence[TensorRef], metadata: Mapping[str, str]) -> Header:
    """The header for these tensors in this order, with offsets made from shapes and dtypes.

    Deterministic: `__metadata__` first, then one entry per tensor in byte order, no spaces, padded to 8 bytes, as
    the reference writer does. The refs' own shard and offsets are ignored.
    """
    entries: dict[str, Json] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: list[tuple[int, int]] = []
    at = 0
    for ref in tensors:
        span = DTYPE_BYTES[ref.dtype] * ref.elements
        spans.append((at, at + span))
        entries[ref.name] = {"dtype": ref.dtype, "shape": list(ref.shape), "data_offsets": [at, at + span]}
        at += span
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    data_start = 8 + len(raw)
    placed = tuple(
        TensorRef(ref.name, ref.dtype, ref.shape, shard, data_start + start, data_start + stop)
        for ref, (start, stop) in zip(tensors, spans, strict=True)
    )
    return Header(placed, dict(metadata), data_start, data_start + at, raw)
