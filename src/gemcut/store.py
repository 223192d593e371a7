"""Run folders: atomic files, atomic folders, fingerprints. A kill leaves the old state or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.types import Json

PARTIAL = ".partial"
MAX_NAME_BYTES = 255  # of one part of a path, on every usual file system
_CHUNK = 8 << 20


def canonical_json(value: Json | Mapping[str, object]) -> bytes:
    """The one JSON spelling that fingerprints use: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: Json | Mapping[str, object]) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex, with a bounded buffer."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        view = memoryview(bytearray(_CHUNK))
        while n := f.readinto(view):
            digest.update(view[:n])
    return digest.hexdigest()


def fsync_folder(path: Path) -> None:
    """Make the renames inside a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_NO_PLACE = frozenset(
    {
        errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)  # fmt: skip


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into a MissingError that says how much is free, and a place that takes no file into another."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MissingError(
                "the disk is full",
                where=str(path),
                got=f"{free_bytes(path) / 2**30:.2f} GiB free",
                hint="free space and run the same command again: finished work is kept",
            ) from error
        if error.errno in _NO_PLACE:
            raise MissingError(f"cannot write: {error.strerror}", where=str(path), hint="choose another -o") from error
        raise


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path` or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def need_disk(path: Path, size_bytes: int) -> None:
    """Refuse before the first minute what cannot fit.

    Raises:
        MissingError: less is free than `size_bytes`.
    """
    free = free_bytes(path)
    if free < size_bytes:
        raise MissingError(
            "not enough disk space",
            where=str(path),
            got=f"{free / 2**30:.2f} GiB free",
            wanted=f"{size_bytes / 2**30:.2f} GiB",
            hint="free space or choose another -o",
        )


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb", *, keep_partial: bool = False) -> Iterator[IO[bytes]]:
    """Write to `path.partial`, fsync, rename over `path`, fsync the folder. An error leaves `path` as it was.

    `keep_partial`: an error leaves the partial file too, for work that resumes ("r+b" opens what is there).
    """
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, mode) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
            fsync_folder(path.parent)
        except BaseException:
            if not keep_partial:
                partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Atomic replacement of a whole file."""
    with atomic_file(path) as f:
        f.write(data)


def write_json(path: Path, value: Json | Mapping[str, object]) -> None:
    """Atomic, indented, key order kept, newline at the end: for people and for diffs."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> dict[str, Json]:
    """A JSON object from outside.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is not UTF-8, not JSON, or not an object, or repeats a key.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no {what}", where=str(path)) from None
    except IsADirectoryError:
        raise UsageError(f"{what} is a folder, not a file", where=str(path)) from None

    def once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key is repeated")
        return out

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object", where=str(path), got=type(value).__name__)
    return value


def refuse_existing(out: Path, *, force: bool) -> None:
    """Outputs are never overwritten without --force."""
    if os.path.exists(out) and not force:  # Path.exists raises where the name is too long
        raise UsageError(
            "the output exists already", where=str(out), hint="choose another -o, or pass --force to replace it"
        )


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


@contextlib.contextmanager
def atomic_folder(out: Path, *, force: bool = False, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `out.partial/`; rename it to `out` when the block succeeds.

    An existing `out` is refused without `force`; with it, old and new are exchanged in one step where the file system
    can, so that a kill leaves the old or the new one whole. On an error the partial folder is removed unless
    `keep_partial` (a stage that resumes).
    """
    refuse_existing(out, force=force)
    partial = out.with_name(out.name + PARTIAL)
    with disk_errors(out):
        if partial.exists() and not keep_partial:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        except BaseException:
            if not keep_partial:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync_folder(partial)
        old = out.with_name(out.name + ".old" + PARTIAL)
        if old.exists():
            shutil.rmtree(old)
        if out.exists() and _exchange(partial, out):
            os.replace(partial, old)  # never found by a later run as work to resume
        else:
            if out.exists():
                os.replace(out, old)
            os.replace(partial, out)
        fsync_folder(out.parent)
        if old.exists():
            shutil.rmtree(old, ignore_errors=True)
