"""Bytes against intent and against the record: recompute everything, believe nothing that is written down."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gemcut.checkpoint.compare import Stored, changes_nothing
from gemcut.checkpoint.diff import config_changes, diff
from gemcut.checkpoint.folder import MANIFEST, SUMS, parse_sums
from gemcut.checkpoint.gather import edited, is_identity, replacing_hash
from gemcut.checkpoint.read import Checkpoint, Progress
from gemcut.errors import CheckpointError
from gemcut.records import load_manifest
from gemcut.store import sha256_file
from gemcut.types import Edit, Edits, Json, Manifest, Mask, Omit, Rename, Replace, Take, TensorFact, TensorRef

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked; the existence of a report means that all of it agreed."""

    manifest: Manifest  # recomputed from the bytes
    tensors_changed: int
    layers_changed: tuple[int, ...]
    plan_checked: bool
    record_checked: bool  # False: the folder has no manifest.json and no SHA256SUMS
    files_checked: int
    files_unlisted: tuple[str, ...]  # lie beside the weights without being in the record: a card, a licence


def verify(
    out: Checkpoint,
    base: Checkpoint,
    *,
    edits: Edits | None = None,
    config: Mapping[str, Json] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Recompute the diff from the bytes; compare it with the intent and with the stored record.

    Args:
        edits: the whole intent (every other tensor must be the same); None checks the record alone.
        config: the config.json that was meant.
    Raises:
        CheckpointError: bytes, record and intent disagree; the message names the first tensors or files.
    """
    manifest = diff(base, out, expected=edits, progress=progress)
    recorded, unlisted = _check_record(out, manifest)
    if edits is not None:
        _check_intent(base, manifest.tensors, edits)
    if config is not None and (wrong := config_changes(config, out.config)):
        key = next(iter(wrong))
        raise CheckpointError(
            "config.json is not what the plan makes of it", where=key, got=wrong[key][1], wanted=wrong[key][0]
        )
    changed = [f.name for f in manifest.tensors if f.found != "same"]
    return VerifyReport(
        manifest=manifest,
        tensors_changed=len(changed),
        layers_changed=_layers(changed),
        plan_checked=edits is not None,
        record_checked=recorded,
        files_checked=len(manifest.files),
        files_unlisted=unlisted,
    )


def _layers(names: Collection[str]) -> tuple[int, ...]:
    return tuple(sorted({int(m[1]) for name in names if (m := _LAYER.search(name))}))


def _names(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check_record(out: Checkpoint, manifest: Manifest) -> tuple[bool, tuple[str, ...]]:
    """Compare with manifest.json and SHA256SUMS. A changed byte is named by tensor where it lies in one."""
    manifest_path, sums_path = out.path / MANIFEST, out.path / SUMS
    if not manifest_path.is_file() and not sums_path.is_file():
        return False, ()
    for path in (manifest_path, sums_path):
        if not path.is_file():
            raise CheckpointError("half of the record is missing", where=path.name, hint="cut again")
    sums = parse_sums(sums_path.read_bytes())
    actual = {**manifest.files, MANIFEST: sha256_file(manifest_path)}
    stored = load_manifest(manifest_path)
    old = {fact.name: fact for fact in stored.tensors}
    new = {fact.name: fact for fact in manifest.tensors}
    tensors = [n for n in {**old, **new} if not facts_agree(old.get(n), new.get(n))]
    bad = [name for name, digest in sums.items() if actual.get(name) != digest]
    bad += [name for name, digest in stored.files.items() if actual.get(name) != digest and name not in bad]
    if tensors:
        raise CheckpointError(
            f"{len(tensors)} tensors are not what the record says" + (f", in {_names(bad)}" if bad else ""),
            where=_names(tensors),
            got=_tell(new.get(min(tensors))),
            wanted=_tell(old.get(min(tensors))),
            hint="the folder was changed after it was written, or compared with another base: cut again",
        )
    if bad:
        missing = [name for name in bad if name not in actual]
        raise CheckpointError(
            "files are missing" if missing else "files are not what the record says", where=_names(missing or bad)
        )
    for key in ("base_fingerprint", "fingerprint", "config_changes", "size_bytes_before", "size_bytes_after"):
        was, now = getattr(stored, key), getattr(manifest, key)
        if was != now:
            raise CheckpointError(
                f"the manifest's {key} disagrees with the bytes",
                where=MANIFEST,
                got=str(was)[:80],
                wanted=str(now)[:80],
                hint="is this the base that it was cut from?",
            )
    return True, tuple(sorted(set(actual) - set(sums)))


def facts_agree(old: TensorFact | None, new: TensorFact | None) -> bool:
    """Same facts. Two edits that explain the same bytes (equal experts) agree; rounding of a norm does too."""
    if old is None or new is None:
        return False
    keys = ("dtype", "shape_before", "shape_after", "blake3_before", "blake3_after", "found", "axis")
    return all(getattr(old, key) == getattr(new, key) for key in keys)


def _tell(fact: TensorFact | None) -> str:
    if fact is None:
        return "no such tensor"
    shape = list(fact.shape_after) if fact.shape_after is not None else "gone"
    return f"{fact.found} {shape} blake3 {(fact.blake3_after or 'none')[:12]}"


def _check_intent(base: Checkpoint, facts: tuple[TensorFact, ...], edits: Edits) -> None:
    found = {fact.name: fact for fact in facts}
    wrong: list[str] = []
    renamed = {edit.to for edit in edits.values() if isinstance(edit, Rename)}
    for name, ref in base.tensors.items():
        fact = found.get(name)
        if fact is None or not _as_meant(base, ref, edits.get(name), fact, found):
            wrong.append(name)
    wrong += [fact.name for fact in facts if fact.found == "added" and fact.name not in renamed]
    if not wrong:
        return
    planned = {n for n, e in edits.items() if n in base.tensors and not is_identity(base.tensors[n], e)}
    changed = [f.name for f in facts if f.found != "same"]
    first = found.get(min(wrong))
    raise CheckpointError(
        f"the plan touches {len(_layers(planned))} layers, bytes differ in {len(_layers(changed))}: "
        f"{len(wrong)} tensors are not as planned",
        where=_names(wrong),
        got=_describe(first),
        wanted=_intent(base.tensors.get(min(wrong)), edits.get(min(wrong))),
        hint="was it healed? then name the heal as well" if first is not None and first.found == "values" else None,
    )


def _as_meant(
    base: Checkpoint, ref: TensorRef, edit: Edit | None, fact: TensorFact, found: Mapping[str, TensorFact]
) -> bool:
    if is_identity(ref, edit):
        return fact.found == "same"
    match edit:
        case Take(axis=axis, index=index):
            return fact.found == "take" and fact.axis == axis and fact.index == index
        case Mask(axis=axis, index=index):
            if fact.found == "same":
                return changes_nothing(Stored(base.path / ref.shard, ref), Mask(axis, index))
            return fact.found == "mask" and fact.axis == axis and fact.index == index
        case Omit():
            return fact.found == "removed"
        case Rename(to=to):
            new = found.get(to)
            return fact.found == "removed" and new is not None and new.blake3_after == fact.blake3_before
        case Replace():
            after = edited(ref, edit)
            fits = after is not None and (fact.dtype, fact.shape_after) == (after.dtype, after.shape)
            return fits and fact.blake3_after == replacing_hash(edit)
        case _:
            return False


def _describe(fact: TensorFact | None) -> str:
    if fact is None:
        return "no such tensor"
    if fact.index is None or fact.axis is None:
        return str(fact.found)
    return f"{fact.found} {_positions(fact.index)} of axis {fact.axis}"


def _positions(index: tuple[int, ...]) -> str:
    """Enough positions to see which plan a tensor followed."""
    shown = " ".join(map(str, index[:12]))
    return f"{shown} … ({len(index)})" if len(index) > 12 else shown


def _intent(ref: TensorRef | None, edit: Edit | None) -> str:
    if ref is None:
        return "no such tensor"
    if is_identity(ref, edit):
        return "same"
    if isinstance(edit, Take | Mask):
        return f"{type(edit).__name__.lower()} {_positions(edit.index)} of axis {edit.axis}"
    return type(edit).__name__.lower()
