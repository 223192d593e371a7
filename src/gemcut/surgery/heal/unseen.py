"""Text that a fit has not seen: what weights come to on it, in all and by class.

Rows of the inner split and of the held-out items lie in a nameless file until the layer is done. Sums of them would
take as much memory as those that are fitted on, and could not be told apart by class.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from gemcut.errors import CheckpointError
from gemcut.records.heal import ClassResidual
from gemcut.store import disk_errors
from gemcut.surgery.heal.settings import Job
from gemcut.surgery.heal.solve import CHUNK_ROWS, Moments


@dataclass(frozen=True, slots=True)
class Residuals:
    """Relative residuals of one set of weights, see `Moments.residual`."""

    whole: float
    by_class: Mapping[str, float]


class Unseen(Protocol):
    """One part of the corpus that is measured on. `samples`: its tokens by class."""

    @property
    def samples(self) -> Mapping[str, int]: ...

    def measure(self, weight: torch.Tensor) -> Residuals:
        """What weights [H, K] come to."""

    def into(self, moments: Moments) -> None:
        """Add everything to a fit's sums."""

    def finite(self) -> bool:
        """Whether every number in it is one."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassSums:
    """Sums of one part in all, and of its classes where they are known."""

    whole: Moments
    by_class: Mapping[str, Moments]

    @classmethod
    def of(cls, parts: Mapping[str, Moments]) -> ClassSums:
        """Of classes, of which there is at least one."""
        first = next(iter(parts.values()))
        whole = type(first)(torch.zeros_like(first.g), torch.zeros_like(first.c))
        for part in parts.values():
            whole.absorb(part)
        return cls(whole, parts)

    @property
    def samples(self) -> Mapping[str, int]:
        return {name: one.n for name, one in self.by_class.items()}

    def measure(self, weight: torch.Tensor) -> Residuals:
        return Residuals(self.whole.residual(weight), {n: one.residual(weight) for n, one in self.by_class.items()})

    def into(self, moments: Moments) -> None:
        moments.absorb(self.whole)

    def finite(self) -> bool:
        return self.whole.finite()


class Rows:
    """Rows x̂ [T, K] and t [T, H] of one part, in the order in which they come, in a file of `folder` without a name.

    Args:
        classes: names; a row is of one of them.
    """

    def __init__(self, folder: Path, hidden: int, kept: int, dtype: torch.dtype, classes: Sequence[str]) -> None:
        self._hidden, self._kept, self._dtype = hidden, kept, dtype
        self._classes = tuple(classes)
        self._of: list[torch.Tensor] = []  # int64 [n] of every batch
        self._root: list[torch.Tensor] = []  # float64 [n]
        self._finite = True
        self.n = 0
        self._folder = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the sums

    def add(self, x: torch.Tensor, root: torch.Tensor, target: torch.Tensor, of: torch.Tensor) -> None:
        """x [n, K] as it was computed, root √w float64 [n], target t float64 [n, H] (kept as float32), of: int64 [n],
        each row's class."""
        wide = target.to(torch.float32)
        self._finite = self._finite and bool(torch.isfinite(x).all() and torch.isfinite(wide).all())
        for block in (x.to(self._dtype), wide):
            view = _bytes_of(block.cpu().contiguous())
            with disk_errors(self._folder):
                while len(view):
                    view = view[self._file.write(view) :]
        self._root.append(root.cpu())
        self._of.append(of.cpu())
        self.n += len(x)

    @property
    def samples(self) -> Mapping[str, int]:
        counts = torch.bincount(torch.cat(self._of), minlength=len(self._classes)).tolist()
        return {name: count for name, count in zip(self._classes, counts, strict=True) if count}

    def finite(self) -> bool:
        return self._finite

    def measure(self, weight: torch.Tensor) -> Residuals:
        wide = weight.to(torch.float64)
        error, size = np.zeros(len(self._classes)), np.zeros(len(self._classes))
        for x, root, target, of in self._read(wide.device):
            missed = torch.addmm(target, x * root[:, None], wide.t(), alpha=-1)
            for sums, rows in ((error, missed), (size, target)):
                sums += np.bincount(of.numpy(), rows.square().sum(-1).cpu().numpy(), minlength=len(sums))
        seen = {self._classes.index(name) for name in self.samples}
        return Residuals(
            _share(float(error.sum()), float(size.sum())),
            {self._classes[i]: _share(float(error[i]), float(size[i])) for i in sorted(seen)},
        )

    def into(self, moments: Moments) -> None:
        for x, root, target, _ in self._read(moments.g.device):
            moments.add(x, root, target)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def _read(self, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """x, root, target in float64 on a device, and the classes, some rows at a time."""
        at = 0
        for root, of in zip(self._root, self._of, strict=True):
            begin_x, begin_t = at, at + len(of) * self._kept * self._dtype.itemsize
            at = begin_t + len(of) * self._hidden * 4
            for first in range(0, len(of), CHUNK_ROWS):
                rows = slice(first, min(first + CHUNK_ROWS, len(of)))
                x = self._block(begin_x, rows, self._kept, self._dtype)
                target = self._block(begin_t, rows, self._hidden, torch.float32)
                yield x.to(device, torch.float64), root[rows].to(device), target.to(device, torch.float64), of[rows]

    def _block(self, begin: int, rows: slice, width: int, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty((rows.stop - rows.start, width), dtype=dtype)
        view = _bytes_of(out)
        at = begin + rows.start * width * dtype.itemsize
        while len(view):
            n = os.preadv(self._file.fileno(), [view], at)
            if n == 0:
                raise CheckpointError("the rows of a heal ended early", where=self._folder.name)
            view, at = view[n:], at + n
        return out


def row_bytes(jobs: Iterable[Job], hidden: int, item: int) -> int:
    """Disk for each token of `Rows`, of the widest output projection; scales of experts need none.

    Args:
        item: bytes of one number as it was computed.
    """
    return max((len(job.columns) * item + hidden * 4 for job in jobs if job.kind == "heads"), default=0)


def _bytes_of(block: torch.Tensor) -> memoryview:
    view: memoryview = block.reshape(-1).view(torch.uint8).numpy().data
    return view


def _share(error: float, size: float) -> float:
    return math.sqrt(error / size) if size > 0 else 0.0


def by_class(before: Residuals, after: Residuals, samples: Mapping[str, int]) -> dict[str, ClassResidual]:
    """For the record: every class that has a token."""
    return {name: ClassResidual(before.by_class[name], after.by_class[name], n) for name, n in sorted(samples.items())}
