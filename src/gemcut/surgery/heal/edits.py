"""A finished heal as edits: no torch, so that cutting and verifying need none."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gemcut.checkpoint.gather import replacing_hash
from gemcut.checkpoint.header import read_header
from gemcut.errors import CheckpointError
from gemcut.records.heal import HEAL_FILE, LayerHeal, load_heal
from gemcut.types import Edit, Edits, Mask, Replace, Take


def heal_edits(folder: Path, edits: Edits, *, layers: Collection[int] | None = None) -> dict[str, Edit]:
    """The edits of a cut with the healed projections or scales in them, where the heal is used; the others stay.

    A mask over the columns of dropped heads becomes the healed tensor, which has zeros there; a take of the columns
    that stay is taken from it. So are the scales of the experts that stay.

    Args:
        folder: what `stream.heal` wrote.
        edits: what the plan means without a heal.
        layers: of the layers that lost heads, take the heal of these only, where a plan was reduced to some of them;
            None: of all. Layers that were healed whole are always taken.
    Raises:
        UsageError: the folder holds no heal.
        CheckpointError: the heal was made for another plan, or a healed tensor is not what was recorded.
    """
    out = dict(edits)
    for one in load_heal(folder / HEAL_FILE).layers:
        if layers is not None and one.layer not in layers and one.dropped:
            continue
        then = _check_cut(one, edits.get(one.tensor))
        if one.file is None:
            continue
        ref = next((r for r in read_header(folder / one.file, one.file).tensors if r.name == one.tensor), None)
        if ref is None:
            raise CheckpointError("a healed tensor is gone", where=f"{one.tensor}, {one.file}")
        whole = Replace(folder / one.file, ref)
        if replacing_hash(whole) != one.blake3:
            raise CheckpointError(
                "a healed tensor is not what was recorded",
                where=f"{one.tensor}, {one.file}",
                hint="the file was changed after it was written: heal again",
            )
        out[one.tensor] = Replace(folder / one.file, ref, then)
    return out


def _check_cut(one: LayerHeal, edit: Edit | None) -> Take | None:
    """What is still to be taken from the healed tensor; refuses a cut of other units than the heal was fitted for."""
    match edit:
        case None if not one.dropped:
            return None
        case Mask(axis=1, index=index) if index == _columns(one.dropped, one.head_dim):
            return None
        case Take(axis=1, index=index) if index == _columns(one.kept, one.head_dim):
            return edit if one.dropped else None
        case Take(axis=0, index=index) if index == one.kept and one.head_dim == 1:  # one scale for each expert
            return edit
        case _:
            raise CheckpointError(
                "the heal was made for another plan",
                where=f"layer {one.layer}, {one.tensor}",
                got=f"healed for dropped units {', '.join(map(str, one.dropped)) or 'none'}",
                wanted="the units that the plan drops",
                hint="heal again with this plan",
            )


def _columns(heads: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    return tuple(head * head_dim + i for head in heads for i in range(head_dim))
