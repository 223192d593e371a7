"""Matrices on their way: read in tiles, their scales found, coded, given out as bytes; only tiles are held."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.made import Made
from gemcut.errors import CheckpointError
from gemcut.export.nvfp4.activations import GroupInput, Key, Observed
from gemcut.export.nvfp4.codec import Coded, encode, global_scale, magnitudes
from gemcut.export.nvfp4.scales import block_scales, column_weights
from gemcut.families.linears import LinearGroup, Matrix
from gemcut.nvfp4.choices import Layout, Method, Scheme
from gemcut.nvfp4.layout import NAMES, tensors_of
from gemcut.types import DTYPE_BYTES

T = TypeVar("T")
_TILE = 1 << 17  # weights in flight for each thread: a few copies of them fit a core's cache
_AHEAD = 2  # tiles for each thread that are done, or underway, before the first of them is wanted
_DEVICE_TILE = 1 << 24
_LAYERS_HELD = 2  # statistics of so many layers: a layer may end in the next shard
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class ModuleFact:
    """One linear as it was written.

    scale, input_scale: G and G_x (None without activation scales).   relative_error: ‖w' − w‖ / ‖w‖.
    """

    module: str
    scale: float
    input_scale: float | None
    relative_error: float


@dataclass(frozen=True, slots=True, eq=False)
class _Scale:
    """What one group's matrices share."""

    weight: float  # G
    input: float | None  # G_x
    columns: torch.Tensor | None


@dataclass(slots=True, eq=False)
class Quantiser:
    """Gives tensors of the new checkpoint; remembers what became of each module.

    Deterministic: the bytes depend on neither threads nor the order of asking.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    layout: Layout
    method: Method
    observed: Observed | None
    groups: Sequence[LinearGroup]
    device: str = "cpu"
    threads: int = 1
    facts: dict[str, ModuleFact] = field(default_factory=dict)
    _scales: dict[tuple[int, str, int], _Scale] = field(default_factory=dict)
    _inputs: OrderedDict[int, Mapping[Key, GroupInput]] = field(default_factory=OrderedDict)
    _pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Threads for as long as the block runs. Each has its own tiles, and torch splits none of them: its own threads
        wait for one another at every step, which on a busy machine takes a hundred times as long."""
        if self.threads < 2 or self.device != "cpu":
            with one_thread():
                yield
            return
        with one_thread(), ThreadPoolExecutor(self.threads, "nvfp4", partial(torch.set_num_threads, 1)) as pool:
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None

    def made(self, tensor: str, groups: Sequence[LinearGroup]) -> Made:
        """What comes in the place of one stored tensor."""
        jobs = [(group, matrix) for group in groups for matrix in group.matrices if matrix.tensor == tensor]
        refs = [ref for _, matrix in jobs for ref in tensors_of(matrix, self.layout, self.scheme)]

        def fill() -> Iterator[memoryview]:
            for group, matrix in jobs:
                yield from self._matrix(group, matrix)

        return Made(tuple(refs), fill)

    def _matrix(self, group: LinearGroup, matrix: Matrix) -> Iterator[memoryview]:
        """The tensors of one matrix, in the order of `layout.tensors_of`."""
        shared = self._shared(group)
        yield self._number(shared.weight)
        if shared.input is not None:
            yield self._number(shared.input)
        scales: list[NDArray[np.uint8]] = []
        error = norm = 0.0
        for found in self._each(partial(self._coded, shared), matrix):
            scales.append(found.scales.view(torch.uint8).cpu().numpy())
            error += found.squared_error
            norm += found.squared_norm
            yield found.packed.cpu().numpy().data.cast("B")
        for one in scales:
            yield one.data.cast("B")
        relative = math.sqrt(error / norm) if norm > 0 else 0.0
        self.facts[matrix.module] = ModuleFact(matrix.module, shared.weight, shared.input, relative)
        if all(one.module in self.facts for one in group.matrices):
            del self._scales[group.layer, group.input, group.unit]

    def _coded(self, shared: _Scale, tile: torch.Tensor) -> Coded:
        scales = block_scales(tile, shared.weight, self.method, shared.columns)
        return encode(tile, scales, shared.weight)

    def _each(self, work: Callable[[torch.Tensor], T], matrix: Matrix) -> Iterator[T]:
        """`work` on every tile of a matrix, in the order of its rows."""
        spans = self._spans(matrix)
        if self._pool is None:
            yield from (work(self._tile(matrix, *span)) for span in spans)
            return
        waiting: deque[Future[T]] = deque()
        for span in spans:
            if len(waiting) >= _AHEAD * self.threads:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(lambda rows: work(self._tile(matrix, *rows)), span))
        while waiting:
            yield waiting.popleft().result()

    def _number(self, divisor: float) -> memoryview:
        value = np.float32(divisor) if NAMES[self.layout].divisor else np.float32(1) / np.float32(divisor)
        return np.array([value], "<f4").data.cast("B")

    def _shared(self, group: LinearGroup) -> _Scale:
        key = (group.layer, group.input, group.unit)
        if key not in self._scales:
            largest = max(self._largest(matrix) for matrix in group.matrices)
            entering = None if self.observed is None else self._layer(self.observed, group)[group.input, group.unit]
            weigh = entering is not None and self.method == "weighted"
            self._scales[key] = _Scale(
                global_scale(largest),
                global_scale(entering.largest) if entering is not None and self.scheme == "NVFP4" else None,
                column_weights(entering.mean_squares).to(self.device) if entering is not None and weigh else None,
            )
        return self._scales[key]

    def _layer(self, observed: Observed, group: LinearGroup) -> Mapping[Key, GroupInput]:
        if group.layer not in self._inputs:
            mine = [one for one in self.groups if one.layer == group.layer]
            self._inputs[group.layer] = observed.layer(group.layer, mine)
            if len(self._inputs) > _LAYERS_HELD:
                self._inputs.popitem(last=False)
        self._inputs.move_to_end(group.layer)
        return self._inputs[group.layer]

    def _largest(self, matrix: Matrix) -> float:
        """max |w|.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        largest = 0.0
        for found in self._each(_peak, matrix):
            if not math.isfinite(found):
                raise CheckpointError(
                    "a weight is NaN or infinite",
                    where=f"{matrix.module}, in {matrix.tensor}",
                    got=found,
                    hint="the checkpoint is damaged, or was trained into the ground",
                )
            largest = max(largest, found)
        return largest

    def _spans(self, matrix: Matrix) -> list[tuple[int, int]]:
        """Rows of every tile: the same whatever the number of threads."""
        step = max(1, (_TILE if self.device == "cpu" else _DEVICE_TILE) // matrix.columns)
        return [(first, min(first + step, matrix.stop)) for first in range(matrix.first, matrix.stop, step)]

    def _tile(self, matrix: Matrix, first: int, stop: int) -> torch.Tensor:
        """Rows [R, F], as they are stored, on the device."""
        dtype = self.checkpoint.ref(matrix.tensor).dtype
        row = matrix.columns * DTYPE_BYTES[dtype]
        raw = self.checkpoint.read_range(matrix.tensor, first * row, stop * row)
        tile = torch.from_numpy(raw).view(_TORCH[dtype]).view(-1, matrix.columns)
        return tile if self.device == "cpu" else tile.to(self.device)


def _peak(tile: torch.Tensor) -> float:
    """max |w|; NaN or infinity where there is one."""
    return float(magnitudes(tile).amax().view(tile.dtype))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch does not split its work while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
