"""A checkpoint as it would be after an edit, without writing it: the shapes, and any range of the bytes, from the base.

What reads tensors in pieces (the GGUF exporter) can thus read a cut that no folder could hold: config.json has one
number of query heads for all layers, a GGUF file has one for each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from gemcut.checkpoint.gather import AxisView, check_edits, edited, is_identity, read_exact, replacing_hash, runs_of
from gemcut.checkpoint.read import U8, Checkpoint
from gemcut.errors import CheckpointError
from gemcut.store import fingerprint
from gemcut.types import DTYPE_BYTES, Edit, Edits, Json, Mask, Omit, Replace, Take, TensorRef

_ROW_BYTES = 1 << 20  # up to here a whole row around the axis is read and gathered; beyond it only the kept runs


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where an edited tensor's bytes come from, and what is done to them around one axis."""

    path: Path
    ref: TensorRef
    view: AxisView
    runs: tuple[tuple[int, int], ...]  # kept positions of `view`, or the zeroed ones
    zero: bool

    @property
    def row(self) -> int:
        """Bytes of the edited tensor for one outer index."""
        if self.zero:
            return self.view.positions * self.view.inner
        return sum(b - a for a, b in self.runs) * self.view.inner


@dataclass(frozen=True, eq=False)
class EditedCheckpoint(Checkpoint):
    """Reads like the cut checkpoint would. Offsets in its refs only tell sizes and the order on disk.

    Its config is the caller's word: nothing checks it against the shapes, which is what `edited` lets through.
    """

    base: Checkpoint = field(kw_only=True)
    edits: Edits = field(kw_only=True)
    origins: Mapping[str, _Origin] = field(kw_only=True)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, the config and every edit; replaced tensors by the hash of their bytes."""
        said = {name: _said(edit) for name, edit in sorted(self.edits.items())}
        return fingerprint({"base": self.base.fingerprint, "config": dict(self.config), "edits": said})

    def read_range(self, name: str, start: int, stop: int) -> U8:
        """Raw bytes `start:stop` of the edited tensor."""
        ref = self.ref(name)
        if not 0 <= start <= stop <= ref.size_bytes:
            raise CheckpointError(
                "a read outside the tensor", where=name, got=f"{start}:{stop}", wanted=f"0:{ref.size_bytes}"
            )
        origin = self.origins[name]
        try:
            fd = os.open(origin.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read the tensor: {error.strerror}", where=name) from None
        try:
            if start == stop:
                return np.empty(0, np.uint8)
            if origin.view.positions * origin.view.inner <= _ROW_BYTES:
                return _gathered(fd, origin, start, stop)
            return _long_runs(fd, origin, start, stop)
        finally:
            os.close(fd)


def edited_checkpoint(base: Checkpoint, edits: Edits, config: Mapping[str, Json]) -> EditedCheckpoint:
    """The base after these edits, with this config.json; it is called what the base is, and `-cut`.

    Raises:
        CheckpointError: an edit does not fit the base.
    """
    check_edits(base.tensors, edits)
    tensors: dict[str, TensorRef] = {}
    origins: dict[str, _Origin] = {}
    for ref in base.tensors.values():
        edit = edits.get(ref.name)
        new = edited(ref, edit)
        if new is not None:
            size = prod(new.shape) * DTYPE_BYTES[new.dtype]
            tensors[new.name] = replace(new, start=ref.start, stop=ref.start + size)
            origins[new.name] = _origin(base.path / ref.shard, ref, edit)
    return EditedCheckpoint(
        path=base.path,
        name=f"{base.name}-cut",
        config=config,
        shards=base.shards,
        tensors=MappingProxyType(tensors),
        index=base.index,
        base=base,
        edits=edits,
        origins=MappingProxyType(origins),
    )


def _origin(path: Path, ref: TensorRef, edit: Edit | None) -> _Origin:
    if isinstance(edit, Replace):
        return _origin(edit.path, edit.ref, edit.then)
    if isinstance(edit, Take | Mask) and not is_identity(ref, edit):
        view, runs = AxisView.of(ref, edit.axis).coarser(runs_of(edit.index))
        return _Origin(path, ref, view, tuple(runs), isinstance(edit, Mask))
    return _Origin(path, ref, AxisView(1, 1, ref.size_bytes), ((0, 1),), False)


def _said(edit: Edit) -> Json:
    match edit:
        case Take(axis=axis, index=index) | Mask(axis=axis, index=index):
            return [type(edit).__name__, axis, list(index)]
        case Replace(then=then):
            return ["Replace", replacing_hash(edit), None if then is None else _said(then)]
        case Omit():
            return ["Omit"]
        case _:
            return ["Rename", edit.to]


def _gathered(fd: int, origin: _Origin, start: int, stop: int) -> U8:
    """Read the whole rows that the range touches, and take or zero the runs in memory."""
    view, row = origin.view, origin.row
    first, last = start // row, -(-stop // row)
    raw = np.empty((last - first, view.positions, view.inner), np.uint8)
    read_exact(fd, origin.ref.start + first * view.positions * view.inner, raw.reshape(-1).data)
    if origin.zero:
        for a, b in origin.runs:
            raw[:, a:b] = 0
    else:
        raw = np.concatenate([raw[:, a:b] for a, b in origin.runs], axis=1)
    return raw.reshape(-1)[start - first * row : stop - first * row]


def _long_runs(fd: int, origin: _Origin, start: int, stop: int) -> U8:
    """Read the parts of the kept runs that lie in the range, one by one; zeroed runs are read over."""
    view, row = origin.view, origin.row
    out = np.zeros(stop - start, np.uint8)
    kept = _others(origin.runs, view.positions) if origin.zero else origin.runs
    for outer in range(start // row, -(-stop // row)):
        at = outer * row  # of the run's first byte in the edited tensor
        for a, b in kept:
            if origin.zero:
                at = outer * row + a * view.inner
            low, high = max(at, start), min(at + (b - a) * view.inner, stop)
            if low < high:
                place = origin.ref.start + (outer * view.positions + a) * view.inner + low - at
                read_exact(fd, place, out[low - start : high - start].data)
            at += (b - a) * view.inner
    return out


def _others(runs: tuple[tuple[int, int], ...], positions: int) -> tuple[tuple[int, int], ...]:
    """What lies between the runs."""
    edges = [0, *(edge for run in runs for edge in run), positions]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
