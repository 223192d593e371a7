"""Matrices on their way: read in tiles, their scales found, coded, given out as bytes; only tiles are held."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.made import Made
from gemcut.errors import CheckpointError, MissingError
from gemcut.export.nvfp4.activations import GroupInput, Key, Observed
from gemcut.export.nvfp4.codec import encode, global_scale, to_blocks
from gemcut.export.nvfp4.layout import NAMES, Layout, Scheme, tensors_of
from gemcut.export.nvfp4.scales import Method, block_scales, column_weights
from gemcut.families.linears import LinearGroup, Matrix
from gemcut.types import DTYPE_BYTES

_TILE = 1 << 16  # weights in flight for each thread: a few float32 copies of them fit a core's cache
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
    facts: dict[str, ModuleFact] = field(default_factory=dict)
    _scales: dict[tuple[int, str, int], _Scale] = field(default_factory=dict)
    _inputs: OrderedDict[int, Mapping[Key, GroupInput]] = field(default_factory=OrderedDict)

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
        for tile in self._tiles(matrix):
            blocks = to_blocks(tile)
            found = encode(blocks, block_scales(blocks, shared.weight, self.method, shared.columns), shared.weight)
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
        for tile in self._tiles(matrix):
            if tile.dtype == torch.bfloat16:  # magnitudes are in the order of their bits, NaN above infinity
                bits = (tile.view(torch.int16) & 0x7FFF).amax()
                found = float(bits.view(torch.bfloat16))
            else:
                found = float(tile.abs().amax())
            if not math.isfinite(found):
                raise CheckpointError(
                    "a weight is NaN or infinite",
                    where=f"{matrix.module}, in {matrix.tensor}",
                    got=found,
                    hint="the checkpoint is damaged, or was trained into the ground",
                )
            largest = max(largest, found)
        return largest

    def _tiles(self, matrix: Matrix) -> Iterator[torch.Tensor]:
        """Runs of rows [R, F], as they are stored, on the device."""
        dtype = self.checkpoint.ref(matrix.tensor).dtype
        row = matrix.columns * DTYPE_BYTES[dtype]
        size = _TILE * torch.get_num_threads() if self.device == "cpu" else _DEVICE_TILE
        step = max(1, size // matrix.columns)
        for first in range(matrix.first, matrix.stop, step):
            stop = min(first + step, matrix.stop)
            raw = self.checkpoint.read_range(matrix.tensor, first * row, stop * row)
            tile = torch.from_numpy(raw).view(_TORCH[dtype]).view(-1, matrix.columns)
            yield tile if self.device == "cpu" else tile.to(self.device)


def check_device(name: str) -> str:
    """Refuse a device that is not here before anything is read.

    Raises:
        MissingError: torch does not see it.
    """
    try:
        torch.zeros(1, device=name).add_(1)
    except (RuntimeError, AssertionError) as error:
        raise MissingError(
            "torch cannot use this device",
            got=name,
            wanted="cpu, or one that gemcut doctor lists",
            hint=str(error).splitlines()[0][:120],
        ) from None
    return name
