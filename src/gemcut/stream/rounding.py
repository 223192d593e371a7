"""What a quantised checkpoint does to activations as a layer runs: inputs in NVFP4, keys and values in FP8.

W4A4: every loader makes the scale of a block of 16 from its own values as they come; the checkpoint gives the one
number G_x that all of a linear's blocks share. FP8 cache: one scale for a layer's keys and one for its values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError
from gemcut.nvfp4.plain import Packed, Plain, divisor, number
from gemcut.stream.experts import InputRounding, round_inputs

_GROUP = 16
_LARGEST_CODE, _LARGEST_SCALE = 6.0, 448.0
_EMPTY_SCALE = 0.125  # for a block whose scale rounds to zero
_PIECE_ELEMENTS = 1 << 20


def round_to_nvfp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x' = e2m1(x·G_x / s) · s / G_x  with  s = e4m3(G_x · (a / 6)), a the largest |x| of the block of 16.

    Dtypes and order of operations are those of compressed-tensors on a CPU: a / 6 in the dtype of x, everything after
    it in float32, the result in the dtype of x. Ties go to the even code; a scale of zero becomes 1/8.

    Args:
        x: [..., F], F a multiple of 16.   scale: G_x.
    Source:
        compressed-tensors 0.20: compute_dynamic_scales_and_zp, _quantize_dequantize, cast_to_fp4.
    """
    rows = x.reshape(-1, _GROUP)
    out = torch.empty_like(rows)
    step = _PIECE_ELEMENTS // _GROUP
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        steps = ((part.abs().amax(-1, keepdim=True) / _LARGEST_CODE).float() * scale).clamp_(max=_LARGEST_SCALE)
        steps = steps.to(torch.float8_e4m3fn).float()
        steps = torch.where(steps == 0, _EMPTY_SCALE, steps) / scale
        out[first : first + step] = _to_codes(part / steps) * steps
    return out.view(x.shape)


def _to_codes(y: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest of 0, ±0.5, ±1, ±1.5, ±2, ±3, ±4, ±6: steps of 0.5 up to 2, of 1 up to 4, then of 2."""
    y = y.clamp(-_LARGEST_CODE, _LARGEST_CODE)
    size = y.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (y / step).round_() * step  # ties to even: the even multiple is the even code


def round_to_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x' = e4m3(x / s) · s, all in the dtype of x, as compressed-tensors rounds what goes into a cache."""
    step = torch.tensor(scale, dtype=x.dtype, device=x.device)
    return (x / step).clamp_(-_LARGEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn).to(x.dtype) * step


class LayerRounding:
    """A checkpoint's scales of inputs, keys and values, put to work on one layer at a time."""

    def __init__(self, checkpoint: Checkpoint, plain: Plain) -> None:
        self._checkpoint = checkpoint
        self._plain = plain

    @contextlib.contextmanager
    def on(self, layer: nn.Module, path: str) -> Iterator[None]:
        """While the block runs, quantised linears and experts of this layer round what enters them, and attention its
        keys and values where the checkpoint has scales for an FP8 cache.

        Args:
            path: of the layer in the checkpoint, `model.layers.3`.
        Raises:
            CheckpointError: a scale is no positive number, or differs where one input has it twice.
        """
        experts: dict[str, dict[str, list[Packed]]] = {}  # module of the experts → gate_up_proj, down_proj → matrices
        with contextlib.ExitStack() as stack:
            for name, packed in self._plain.packed.items():
                if not name.startswith(f"{path}.") or packed[0].inputs is None:
                    continue
                owner, _, leaf = name.removeprefix(f"{path}.").rpartition(".")
                if leaf == "weight":
                    hook = _Hook(self._scale(packed[0]))
                    stack.callback(layer.get_submodule(owner).register_forward_pre_hook(hook).remove)
                else:
                    experts.setdefault(owner, {})[leaf] = list(packed)
            for attention, (keys, values) in self._plain.cache.items():
                if attention.startswith(f"{path}."):
                    cache = _Fp8Cache(number(self._checkpoint, keys), number(self._checkpoint, values))
                    module = layer.get_submodule(attention.removeprefix(f"{path}."))
                    stack.callback(module.register_forward_pre_hook(cache.hook, with_kwargs=True).remove)
            for owner, parts in experts.items():
                module = layer.get_submodule(owner)
                gate_up = self._scales(parts.get("gate_up_proj", []), 2)
                round_inputs(module, _Experts(gate_up, self._scales(parts.get("down_proj", []), 1)))
                stack.callback(round_inputs, module, None)
            yield

    def _scale(self, packed: Packed) -> float:
        assert packed.inputs is not None
        return divisor(self._checkpoint, packed.inputs, self._plain.told.layout)

    def _scales(self, packed: Sequence[Packed], each: int) -> list[float]:
        """One for every expert; `each` matrices of an expert read the same input."""
        found = []
        for first in range(0, len(packed), each):
            mine = [self._scale(one) for one in packed[first : first + each]]
            if len(set(mine)) > 1:
                raise CheckpointError(
                    "what servers fuse has different scales of its inputs", where=packed[first].matrix.module, got=mine
                )
            found.append(mine[0])
        return found


class _Hook:
    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_to_nvfp4(args[0], self._scale), *args[1:])


class _Fp8Cache:
    """Stands where a cache would: gives keys and values back as reading them would, and keeps nothing."""

    def __init__(self, keys: float, values: float) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return round_to_fp8(keys, self._keys), round_to_fp8(values, self._values)

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "past_key_values": self}


class _Experts(InputRounding):
    """Scales of what enters gate_up_proj and down_proj, one for each expert; empty where that is not quantised."""

    def __init__(self, gate_up: Sequence[float], down: Sequence[float]) -> None:
        self._gate_up, self._down = gate_up, down

    def inputs(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return round_to_nvfp4(x, self._gate_up[expert]) if self._gate_up else x

    def inner(self, expert: int, h: torch.Tensor) -> torch.Tensor:
        return round_to_nvfp4(h, self._down[expert]) if self._down else h
