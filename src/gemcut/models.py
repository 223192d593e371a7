"""Models by reference: what a verb or recipe names, opened; headers only. Imports little: verbs start fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemcut import checkpoint, shipped
from gemcut.checkpoint import Checkpoint, open_checkpoint, resolve
from gemcut.errors import UsageError
from gemcut.families import is_drafter
from gemcut.gguf_file import open_gguf
from gemcut.gguf_file.compare import diff_gguf
from gemcut.inspection import Inspection, inspect
from gemcut.types import Manifest

Progress = Callable[[int, int, str], None]


def is_gguf(ref: str) -> bool:
    """Whether a reference names a GGUF file."""
    return ref.lower().endswith(".gguf")


def open_model(ref: str) -> Checkpoint:
    """A shipped model, a local folder, or a hub id, in this order; headers only."""
    local = shipped.model_path(ref)
    if local is not None:
        return open_checkpoint(local, ref)
    _refuse_gguf(ref)
    found = resolve(ref)
    return open_checkpoint(found.path, found.name)


def _refuse_gguf(ref: str) -> None:
    if is_gguf(ref) and Path(ref).is_file():
        raise UsageError(
            "a checkpoint is wanted here, and this is a GGUF file", where=ref, wanted="a folder of safetensors",
            hint="cut, verify, diff and kld take GGUF files",
        )  # fmt: skip


def open_exportable(ref: str) -> Checkpoint:
    """A model, or a drafter, which can be exported and not cut; headers only."""
    found = open_any(ref)
    if not is_drafter(found.config):
        _ = found.sites  # every shape that the family relies on
    return found


def inspection(ref: str) -> Inspection:
    """What a checkpoint is; headers only."""
    return inspect(open_model(ref))


def diff(a: str, b: str, *, progress: Progress | None = None) -> Manifest:
    """Tensor by tensor between two checkpoints, or two GGUF files, of whatever architecture.

    Raises:
        UsageError: one is a GGUF file and the other is none.
    """
    files = [is_gguf(one) for one in (a, b)]
    if all(files):
        return diff_gguf(open_gguf(Path(a)), open_gguf(Path(b)), progress=progress)
    if any(files):
        raise UsageError(
            "a GGUF file and a folder have no tensor in common",
            got=f"{a} and {b}",
            wanted="two folders, or two GGUF files",
            hint="gemcut kld compares what they say",
        )
    return checkpoint.diff(open_any(a), open_any(b), progress=progress)


def open_any(ref: str) -> Checkpoint:
    """A model of whatever architecture, its shapes not held against its config; headers only."""
    local = shipped.model_path(ref)
    _refuse_gguf(ref)
    found = resolve(ref) if local is None else None
    path = local if found is None else found.path
    assert path is not None
    return open_checkpoint(path, ref if found is None else found.name, any_architecture=True)


def candidate_names(refs: tuple[str, ...]) -> dict[str, Path]:
    """Names for candidate folders: the last part of each path, made unique."""
    out: dict[str, Path] = {}
    for ref in refs:
        path = shipped.model_path(ref) or Path(ref)
        name = ref if ref.startswith("demo:") else path.resolve().name
        if name in out or name == "model":
            name = "/".join(path.resolve().parts[-2:])
        while name in out:
            name += "'"
        out[name] = path
    return out
