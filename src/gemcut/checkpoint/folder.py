"""The files of a checkpoint folder beside the weights: listed, checked by name, hashed, copied byte for byte."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from gemcut.checkpoint.gather import new_buffer, span
from gemcut.errors import CheckpointError
from gemcut.store import PARTIAL

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
RECORDS = (MANIFEST, SUMS)  # ours, written anew; never copied, never part of what they describe
_CACHES = {".git", ".cache", "__pycache__", ".ipynb_checkpoints"}
_SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")

log = logging.getLogger(__name__)


def list_files(folder: Path) -> list[str]:
    """Every file as a relative posix path, sorted; caches, partial files and our own records left out.

    Links to files are listed (a Hugging Face cache is made of them); links to folders are refused.

    Raises:
        CheckpointError: a broken link, a pipe or device, a linked folder, or a name that no record can hold.
    """
    found: list[str] = []

    def walk(at: Path, prefix: str) -> None:
        for entry in sorted(os.scandir(at), key=lambda e: e.name):
            name = prefix + entry.name
            if entry.name in _CACHES or entry.name.endswith(PARTIAL) or name in RECORDS:
                continue
            if not entry.name.isprintable() or "\\" in entry.name or ":" in entry.name:
                raise CheckpointError("a file has a name that no record can hold", where=ascii(name)[:200])
            try:
                mode = entry.stat().st_mode
            except FileNotFoundError:
                raise CheckpointError(
                    "a link in the folder leads nowhere", where=name, hint="is the download complete?"
                ) from None
            if stat.S_ISDIR(mode):
                if entry.is_symlink():
                    raise CheckpointError(
                        "the folder holds a link to another folder", where=name, hint="put the real folder in its place"
                    )
                walk(Path(entry.path), name + "/")
            elif stat.S_ISREG(mode):
                found.append(name)
            else:
                raise CheckpointError("the folder holds something that is not a file", where=name)

    walk(folder, "")
    return found


def copy_file(source: Path, target: Path, *, sync: bool = True) -> None:
    """Copy one file's bytes into a new file (never into an existing one) and fsync it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fd_in = os.open(source, os.O_RDONLY)
    try:
        size = os.fstat(fd_in).st_size
        fd_out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for piece in span(fd_in, 0, size, new_buffer()):
                write_all(fd_out, piece)
            if sync:
                os.fsync(fd_out)
        finally:
            os.close(fd_out)
    finally:
        os.close(fd_in)


def write_all(fd: int, piece: memoryview) -> None:
    """Write every byte; a short write goes on where it stopped."""
    while piece:
        piece = piece[os.write(fd, piece) :]


def link_file(source: Path, target: Path) -> bool:
    """Hard-link `target` to the file behind `source`; False where the file system will not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        log.info("copying %s instead of linking it: %s", target.name, error.strerror)
        return False
    return True


def sums_text(files: Mapping[str, str]) -> str:
    """SHA256SUMS, as `sha256sum -c` reads it."""
    return "".join(f"{files[name]}  {name}\n" for name in sorted(files))


def parse_sums(raw: bytes) -> dict[str, str]:
    """File name → sha256 from a SHA256SUMS file.

    Raises:
        CheckpointError: a line is not `hash  name`, or a name comes twice.
    """
    files: dict[str, str] = {}
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise CheckpointError("the list of hashes is not UTF-8", where=SUMS) from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        match = _SUM_LINE.fullmatch(line)
        if match is None or match[2] in files:
            raise CheckpointError("a line of the list of hashes is malformed", where=f"{SUMS}, line {number}")
        files[match[2]] = match[1]
    return files


def size_of(folder: Path, names: Iterable[str]) -> int:
    """Bytes of these files together."""
    return sum((folder / name).stat().st_size for name in names)
