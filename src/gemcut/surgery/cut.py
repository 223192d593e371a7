"""A plan becomes edits, edits become a checkpoint, and both are held against its bytes. No torch, no dtype."""

from __future__ import annotations

from pathlib import Path

from gemcut.checkpoint.read import Checkpoint, Progress
from gemcut.checkpoint.verify import VerifyReport, verify
from gemcut.checkpoint.write import write_checkpoint
from gemcut.surgery.edits import config_for, edits_for
from gemcut.types import Manifest, Plan


def cut(
    base: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    healed: Path | None = None,
    force: bool = False,
    link: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Write the cut checkpoint; the manifest that lies beside it is computed from the written bytes.

    Args:
        healed: a heal of this cut (see `surgery.heal`): what it refitted is written for the layers of the plan.
    Raises:
        UsageError: the plan says what the architecture cannot hold; `out` exists without `force`.
        CheckpointError: the plan was made for another checkpoint.
        MissingError: not enough disk.
    """
    edits = edits_for(plan, base, healed)
    config = config_for(plan, base)
    return write_checkpoint(base, edits, config, out, force=force, link=link, progress=progress).manifest


def verify_cut(
    out: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    *,
    healed: Path | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Bytes against the plan, the heal and the stored record; see `checkpoint.verify`."""
    edits, config = edits_for(plan, base, healed), config_for(plan, base)
    return verify(out, base, edits=edits, config=config, progress=progress)
