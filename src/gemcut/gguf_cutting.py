"""GGUF files as the verbs `cut`, `verify` and `diff` meet them: named, opened, held against plans and records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemcut import models, store, surgery
from gemcut.checkpoint.verify import facts_agree
from gemcut.errors import CheckpointError, UsageError
from gemcut.gguf_file import open_gguf
from gemcut.gguf_file.compare import diff_gguf
from gemcut.records import load_manifest, load_plan
from gemcut.surgery.gguf import MANIFEST, GgufCut
from gemcut.types import Manifest

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class GgufCutPreflight:
    """A cut before it is written. Sizes are exact.   tensors: that lose rows or columns."""

    size_bytes_before: int
    size_bytes_after: int
    tensors: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class GgufVerified:
    """What was checked; the existence of it means that all of it agreed."""

    manifest: Manifest
    plan_checked: bool
    record_checked: bool


def open_cut(model: Path, plan_file: Path, out: Path, *, any_parent: bool = False) -> GgufCut:
    """The plan held against the file; headers only.

    Raises:
        UsageError: `out` is no name of a GGUF file; see `plan_gguf_cut`.
        CheckpointError: the plan does not fit the file.
    """
    if not models.is_gguf(out.name):
        raise UsageError("a cut GGUF file is a GGUF file", got=f"-o {out.name}", wanted="-o NAME.gguf")
    return surgery.plan_gguf_cut(open_gguf(model), load_plan(plan_file), out.name, any_parent=any_parent)


def estimate(cut: GgufCut, out: Path) -> GgufCutPreflight:
    """What it would write. MissingError where the disk is too small."""
    layout, shapes = cut.layout, cut.file.tensors
    store.need_disk(out, layout.size_bytes)
    changed = [name for name, ref in layout.tensors.items() if ref.shape != shapes[name].shape]
    return GgufCutPreflight(cut.file.size_bytes, layout.size_bytes, len(changed), store.free_bytes(out))


def verify(
    model: Path,
    base: Path,
    plan_file: Path | None,
    *,
    any_parent: bool = False,
    progress: Progress | None = None,
) -> GgufVerified:
    """A cut file against the file it was cut from, the plan, and the manifest beside it.

    Raises:
        UsageError: there is neither a plan nor a manifest.
        CheckpointError: they disagree.
    """
    file, source = open_gguf(model), open_gguf(base)
    record = model.with_name(file.parts[0] + MANIFEST)
    if plan_file is None and not record.is_file():
        raise UsageError("there is nothing to hold the file against", where=model.name, wanted=f"--plan, or {MANIFEST}")
    if plan_file is not None:
        cut = surgery.plan_gguf_cut(source, load_plan(plan_file), model.name, any_parent=any_parent)
        manifest = surgery.verify_gguf_cut(cut, file, progress=progress)
    else:
        manifest = diff_gguf(source, file, progress=progress)
    if record.is_file():
        _check_record(load_manifest(record), manifest, record.name)
    return GgufVerified(manifest, plan_file is not None, record.is_file())


def _check_record(stored: Manifest, found: Manifest, where: str) -> None:
    old, new = ({fact.name: fact for fact in one.tensors} for one in (stored, found))
    wrong = [name for name in {**old, **new} if not facts_agree(old.get(name), new.get(name))]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are not what the record says",
            where=f"{wrong[0]}, {where}",
            hint="the file was changed after it was written, or compared with another base: cut again",
        )
    for key in ("base_fingerprint", "fingerprint", "config_changes", "files", "size_bytes_before", "size_bytes_after"):
        was, now = getattr(stored, key), getattr(found, key)
        if was != now:
            raise CheckpointError(
                f"the manifest's {key} disagrees with the bytes", where=where, got=str(was)[:80], wanted=str(now)[:80]
            )
