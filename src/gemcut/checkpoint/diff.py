"""Two checkpoints, tensor by tensor, from their bytes."""

from __future__ import annotations

from collections.abc import Mapping

from gemcut.checkpoint.compare import Stored
from gemcut.checkpoint.folder import list_files
from gemcut.checkpoint.ledger import Ledger
from gemcut.checkpoint.read import Checkpoint, Progress
from gemcut.records import MANIFEST_SCHEMA
from gemcut.types import Edits, Json, Manifest, TensorFact, TensorRef


def diff(
    base: Checkpoint, other: Checkpoint, *, expected: Edits | None = None, progress: Progress | None = None
) -> Manifest:
    """What turned `base` into `other`: per tensor the edit found, config changes, hashes of the other's files.

    Streams both checkpoints once with a bounded buffer. A renamed tensor is one removed and one added with equal
    hashes.

    Args:
        expected: edits tried first where several explain the same bytes; never believed, only checked.
    """
    expected = expected or {}
    with Ledger() as ledger:
        for before, after in pairs(base, other):
            hint = expected.get(before.name) if before is not None else None
            ledger.compare(stored(base, before), stored(other, after), hint)
        for name in list_files(other.path):
            path = other.path / name
            ledger.hash_file(path, name, path.stat().st_size)
        facts, files = ledger.finish(progress)
    return make_manifest(base, other, facts, files)


def pairs(base: Checkpoint, other: Checkpoint) -> list[tuple[TensorRef | None, TensorRef | None]]:
    """Tensors of both by name, in the base's order, then what the other adds."""
    out: list[tuple[TensorRef | None, TensorRef | None]] = [
        (ref, other.tensors.get(name)) for name, ref in base.tensors.items()
    ]
    out += [(None, ref) for name, ref in other.tensors.items() if name not in base.tensors]
    return out


def stored(checkpoint: Checkpoint, ref: TensorRef | None) -> Stored | None:
    """The tensor with the file that holds it."""
    return None if ref is None else Stored(checkpoint.path / ref.shard, ref)


def make_manifest(
    base: Checkpoint, other: Checkpoint, facts: tuple[TensorFact, ...], files: Mapping[str, str]
) -> Manifest:
    """Facts, config changes and file hashes in one record."""
    return Manifest(
        schema=MANIFEST_SCHEMA,
        base_fingerprint=base.fingerprint,
        fingerprint=other.fingerprint,
        tensors=facts,
        config_changes=config_changes(base.config, other.config),
        files=dict(files),
        size_bytes_before=base.size_bytes,
        size_bytes_after=other.size_bytes,
    )


def config_changes(before: Mapping[str, Json], after: Mapping[str, Json]) -> dict[str, tuple[Json, Json]]:
    """Dotted key → (before, after), None for a key that is not there. Lists are compared whole."""
    out: dict[str, tuple[Json, Json]] = {}

    def walk(old: Mapping[str, Json], new: Mapping[str, Json], prefix: str) -> None:
        for key in [*old, *(k for k in new if k not in old)]:
            a, b = old.get(key), new.get(key)
            if isinstance(a, dict) and isinstance(b, dict):
                walk(a, b, f"{prefix}{key}.")
            elif a != b or type(a) is not type(b) or (key in old) != (key in new):
                out[prefix + key] = (a, b)

    walk(before, after, "")
    return out
