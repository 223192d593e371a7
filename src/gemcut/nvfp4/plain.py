"""An NVFP4 checkpoint seen as the tensors that a model's own modules want: fused experts, `.weight`, its own shapes.

Headers say which plain tensor each packed matrix is rows of; numbers and codes are read when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.checkpoint.read import Checkpoint
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError
from gemcut.families.linears import LinearGroup, Matrix
from gemcut.nvfp4.choices import Layout
from gemcut.nvfp4.decode import dequantise
from gemcut.nvfp4.layout import NAMES, Told, cache_tensors, read_config, tensors_of
from gemcut.types import F32, TensorRef

_GROUP = 16


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix on disk.   inputs: its inputs' scale, None where activations are not quantised."""

    matrix: Matrix
    codes: TensorRef
    scales: TensorRef
    scale: TensorRef
    inputs: TensorRef | None


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """What the checkpoint is made of.

    shapes: every plain tensor, those that are stored as they are included.
    packed: plain tensor → its matrices, in the order of its rows, all of its rows.
    groups: every matrix of the decoder, by what servers fuse.
    cache: attention module → the scales of its keys and of its values, where an FP8 cache has them.
    """

    told: Told
    shapes: Mapping[str, tuple[int, ...]]
    packed: Mapping[str, tuple[Packed, ...]]
    groups: tuple[LinearGroup, ...]
    cache: Mapping[str, tuple[TensorRef, TensorRef]]


def plain_tensors(checkpoint: Checkpoint) -> Plain:
    """Put the linears of an NVFP4 checkpoint, in either layout, back into the tensors that they came from.

    Raises:
        CheckpointError: config.json does not speak of NVFP4; a part of a linear is missing or has another form; an
            expert is missing; something packed is no matrix of the decoder.
        UsageError: an architecture that no family knows.
    """
    told = read_config(checkpoint.config, checkpoint.name)
    names, tensors = NAMES[told.layout], checkpoint.tensors
    linears: dict[str, tuple[int, int]] = {}
    for name, ref in tensors.items():
        module = name.removesuffix(names.packed)
        if name.endswith(names.packed) and ref.dtype == "U8":
            if len(ref.shape) != 2:
                raise CheckpointError("codes have not two axes", where=name, got=list(ref.shape))
            linears[module] = (ref.shape[0], 2 * ref.shape[1])
    if not linears:
        raise CheckpointError("the checkpoint has no NVFP4 tensor", where=checkpoint.name)
    family = checkpoint.family.linears()
    ends = (names.packed, names.scales, names.scale, names.inputs)
    parts = {module + end for module in linears for end in ends}
    cache = _cache(tensors, told)
    parts |= {ref.name for both in cache.values() for ref in both}
    shapes = {name: ref.shape for name, ref in tensors.items() if name not in parts} | family.stored(linears)
    groups = family.groups(checkpoint.text_config, shapes)
    packed: dict[str, list[Packed]] = {}
    for matrix in (matrix for group in groups for matrix in group.matrices):
        if linears.pop(matrix.module, None) is not None:
            packed.setdefault(matrix.tensor, []).append(_packed(tensors, matrix, told))
    if linears:
        raise CheckpointError("something is packed that is no matrix of the decoder", where=min(linears))
    for name, found in packed.items():
        found.sort(key=lambda one: one.matrix.first)
        _check_rows(name, shapes[name], found)
    return Plain(told, shapes, {name: tuple(found) for name, found in packed.items()}, groups, cache)


def _packed(tensors: Mapping[str, TensorRef], matrix: Matrix, told: Told) -> Packed:
    """The tensors of one matrix, each in the form that its layout asks for."""
    if matrix.columns % _GROUP:
        raise CheckpointError("a width is not a multiple of 16", where=matrix.module, got=matrix.columns)
    found: dict[str, TensorRef] = {}
    for wanted in tensors_of(matrix, told.layout, told.scheme):
        ref = tensors.get(wanted.name)
        if ref is None:
            raise CheckpointError("a tensor is missing", where=wanted.name, wanted=wanted.dtype)
        numbers = wanted.dtype == "F32"  # some tools write one number as [1], others as []
        if ref.dtype != wanted.dtype or (ref.elements != 1 if numbers else ref.shape != wanted.shape):
            got = f"{ref.dtype} {list(ref.shape)}"
            raise CheckpointError(
                "a tensor has another form", where=ref.name, got=got, wanted=f"{wanted.dtype} {list(wanted.shape)}"
            )
        found[ref.name] = ref
    names, module = NAMES[told.layout], matrix.module
    return Packed(
        matrix,
        found[module + names.packed],
        found[module + names.scales],
        found[module + names.scale],
        found.get(module + names.inputs),
    )


def _cache(tensors: Mapping[str, TensorRef], told: Told) -> dict[str, tuple[TensorRef, TensorRef]]:
    if not told.cache:
        return {}
    of_keys, of_values = (ref.name for ref in cache_tensors("", told.layout))  # the ends of their names
    found = {}
    for name, keys in tensors.items():
        if not name.endswith(of_keys):
            continue
        attention = name.removesuffix(of_keys)
        values = tensors.get(attention + of_values)
        if values is None:
            raise CheckpointError("the scale of a layer's values is missing", where=attention + of_values)
        for ref in (keys, values):
            if ref.dtype not in ("F32", "BF16") or ref.elements != 1:
                got = f"{ref.dtype} {list(ref.shape)}"
                raise CheckpointError("a scale of the cache has another form", where=ref.name, got=got)
        found[attention] = (keys, values)
    return found


def _check_rows(name: str, shape: tuple[int, ...], packed: list[Packed]) -> None:
    at = 0
    for one in packed:
        if one.matrix.first != at:
            break
        at = one.matrix.stop
    if at != math.prod(shape[:-1]):
        raise CheckpointError("some rows of a tensor are packed and others are not", where=name, got=at)


def divisor(checkpoint: Checkpoint, ref: TensorRef, layout: Layout) -> float:
    """G or G_x, from whichever of it and its reciprocal the layout stores.

    Raises:
        CheckpointError: it is no positive, finite number.
    """
    value = number(checkpoint, ref)
    return value if NAMES[layout].divisor else 1.0 / value


def number(checkpoint: Checkpoint, ref: TensorRef) -> float:
    """A scale as it is stored, F32 or BF16.

    Raises:
        CheckpointError: it is no positive, finite number.
    """
    found = decode(ref.dtype, checkpoint.read(ref.name))
    value = math.nan if found is None else float(found[0])
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError("a scale is not a positive number", where=ref.name, got=value)
    return value


def read_rows(checkpoint: Checkpoint, packed: Packed, scale: float, first: int, stop: int) -> F32:
    """Rows `first … stop` of one matrix, float32 [stop − first, F]; see `decode.dequantise`.

    Args:
        scale: G, as `divisor` reads it.
    """
    columns = packed.matrix.columns
    codes = checkpoint.read_range(packed.codes.name, first * columns // 2, stop * columns // 2)
    scales = checkpoint.read_range(packed.scales.name, first * columns // _GROUP, stop * columns // _GROUP)
    return dequantise(codes.reshape(stop - first, -1), scales.reshape(stop - first, -1), scale)
