"""What is remembered of an export: a record beside each file, and a journal while it is being written.

A tensor is known by the hash of what filled it, its type, its importances and the quantiser; its payload by a hash of
its own, which is checked whenever the payload is used again. So nothing here is believed: a wrong record costs time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from gemcut.errors import CheckpointError, UsageError
from gemcut.ggml.types import GgmlType
from gemcut.store import PARTIAL, read_json
from gemcut.types import Json

FORMAT, SCHEMA = "gemcut gguf", 1
RECORD = ".json"  # NAME.gguf.json
JOURNAL = PARTIAL + ".jsonl"  # NAME.gguf.partial.jsonl
_HEX = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fact:
    """One tensor in one file.

    source: hash of what filled it.   importance: hash, "" for none.   payload: hash of the stored bytes.
    """

    name: str
    kind: str
    source: str
    importance: str
    payload: str


@dataclass(frozen=True, slots=True)
class Record:
    """What stands beside a file. Holds no path.

    settings: see `Planned`.   parent: fingerprint of the checkpoint.   quantiser: identity of the library.
    """

    file: str
    parts: tuple[str, ...]
    size_bytes: int
    bits_per_weight: float
    settings: str
    parent: str
    quantiser: str
    facts: tuple[Fact, ...]

    def to_json(self) -> dict[str, Json]:
        """As it is stored."""
        tensors: dict[str, Json] = {}
        for fact in self.facts:
            entry: dict[str, Json] = {"type": fact.kind, "source": fact.source, "payload": fact.payload}
            tensors[fact.name] = {**entry, **({"importance": fact.importance} if fact.importance else {})}
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "file": self.file,
            "parts": list(self.parts),
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "settings": self.settings,
            "parent": self.parent,
            "quantiser": self.quantiser,
            "tensors": tensors,
        }


def record_path(folder: Path, name: str) -> Path:
    """Where the record of a file lies."""
    return folder / (name + RECORD)


def load_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UsageError: there is none.
        CheckpointError: it is not one.
    """
    value = read_json(path, "record of an export")
    if value.get("format") != FORMAT or value.get("schema") != SCHEMA:
        raise CheckpointError("not the record of an export", where=path.name)
    tensors, parts = value.get("tensors"), value.get("parts")
    size, bits = value.get("size_bytes"), value.get("bits_per_weight")
    said = [value.get(key) for key in ("file", "settings", "parent", "quantiser")]
    texts = [one for one in said if isinstance(one, str)]
    if not isinstance(tensors, dict) or not isinstance(parts, list) or len(texts) != len(said):
        raise CheckpointError("the record of an export is malformed", where=path.name)
    names = tuple(part for part in parts if isinstance(part, str) and "/" not in part and "\\" not in part)
    facts = tuple(fact for name, entry in tensors.items() if (fact := _fact(name, entry)) is not None)
    numbers = isinstance(size, int) and isinstance(bits, int | float)
    if len(facts) != len(tensors) or not names or len(names) != len(parts) or not numbers:
        raise CheckpointError("the record of an export is malformed", where=path.name)
    assert isinstance(size, int)
    assert isinstance(bits, int | float)
    return Record(texts[0], names, size, float(bits), texts[1], texts[2], texts[3], facts)


def earlier_records(folder: Path) -> Iterator[Record]:
    """Every record in a folder that can be read, in the order of their names."""
    for path in sorted(folder.glob("*.gguf" + RECORD)) if folder.is_dir() else ():
        try:
            yield load_record(path)
        except (CheckpointError, UsageError) as error:
            log.warning("%s is passed over: %s", path.name, error.what)


def _fact(name: Json, entry: Json) -> Fact | None:
    if not isinstance(name, str) or not isinstance(entry, dict):
        return None
    kind, source, payload = entry.get("type"), entry.get("source"), entry.get("payload")
    importance = entry.get("importance", "")
    if not isinstance(kind, str) or kind not in GgmlType.__members__:
        return None
    hashes = [one for one in (source, payload, importance or source) if isinstance(one, str) and len(one) == _HEX]
    if len(hashes) != 3 or not isinstance(importance, str):
        return None
    return Fact(name, kind, hashes[0], importance, hashes[1])


class Journal:
    """Facts of a file that is not finished, a line each; a line that a kill cut off is as if it were not there."""

    def __init__(self, path: Path, settings: str) -> None:
        self._path = path
        self._file = _locked(path)
        self.facts = dict(journalled(path, settings))
        # written anew: a torn last line must not run into the next one
        lines = [json.dumps({"settings": settings}), *(json.dumps(asdict(fact)) for fact in self.facts.values())]
        self._file.truncate(0)
        self._file.write("".join(line + "\n" for line in lines))

    def add(self, fact: Fact) -> None:
        """A tensor is complete."""
        self.facts[fact.name] = fact
        self._file.write(json.dumps(asdict(fact)) + "\n")

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The record says it all now."""
        self._path.unlink(missing_ok=True)
        self.close()


def _locked(path: Path) -> TextIO:
    """The journal, open for appending and for this process alone; the lock goes with the process.

    Raises:
        UsageError: another run writes the same file: each would put its bytes into the other's.
    """
    file = path.open("a", buffering=1)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        mine = error.errno not in (errno.EAGAIN, errno.EACCES)  # some network file systems have no locks
    if not mine:  # or its run has just ended, and taken the journal away
        file.close()
        name = path.name.removesuffix(JOURNAL)
        raise UsageError("another run writes this file", where=name, hint="wait for it, or choose another -o")
    return file


def journalled(path: Path, settings: str) -> Mapping[str, Fact]:
    """Facts of a journal of these settings; none where there is no such journal."""
    return {fact.name: fact for fact in _journal_lines(path, settings) or ()}


def _journal_lines(path: Path, settings: str) -> list[Fact] | None:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    facts: list[Fact] = []
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict):
            break
        if number == 0:
            if value.get("settings") != settings:
                return None
            continue
        fact = _fact(value.get("name"), {**value, "type": value.get("kind")})
        if fact is None:
            break
        facts.append(fact)
    return facts if lines[0] else None
