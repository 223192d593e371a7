"""An NVFP4 checkpoint as a GGUF file: the same codes and the same block scales, in llama.cpp's order of bits.

    w' = e2m1 · s · (1/G)      block: 64 columns of a row = 4 scales s, one byte each, then 4 × 8 bytes of codes; byte j
                               of 16 columns has column j in its low nibble and column j + 8 in its high one (on disk
                               2j and 2j + 1)
    X.scale        F32 [1], or [E] for experts: 1/G. llama.cpp multiplies X's output with it
    X.input_scale  F32, the same of the inputs' scale, where activations are quantised

Experts lie apart, gate and up too, since llama.cpp reads no scale for fused ones; ffn_down_exps.scale, which holds the
router's per_expert_scale otherwise, holds the product. Where 64 does not divide the columns, or 16 bits are asked
for, e2m1 · s is stored as BF16, which holds every such product (six significant bits, 2^-10 … 2688): nothing is rounded
there either.
Source: llama.cpp conversion/base.py (_nvfp4_pack), conversion/gemma.py, ggml-common.h (block_nvfp4), llama-model.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.read import U8
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.layout import plain_config
from gemcut.export.metadata import QUANTIZATION_VERSION
from gemcut.export.mix.overrides import Override, decided
from gemcut.export.mix.shapes import unquantised_type
from gemcut.families import gguf_layout
from gemcut.families.gguf import GgufLayout, GgufTensor, Value
from gemcut.ggml.types import GgmlType, fits, tensor_bytes
from gemcut.nvfp4.decode import dequantise
from gemcut.nvfp4.plain import Packed, Plain, divisor, plain_tensors
from gemcut.types import F32, TensorRef

FILE_TYPES = {"NVFP4": 39, "BF16": 32}  # → general.file_type
_GROUP, _BLOCK = 16, 64
_LARGEST_SCALE = 0x7E  # e4m3 bytes above it are NaN or negative; ggml reads the one as 0 and knows no others
_APART = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps"}
_FUSED = "ffn_gate_up_exps"
_EXTRA = "general.tensor_extra"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RepackedCheckpoint(Checkpoint):
    """Reads like a folder whose matrices are GGUF blocks. Offsets in its refs only tell sizes and the order on disk.

    matrices: tensor → the packed matrices that are its rows, in their order.
    """

    base: Checkpoint = field(kw_only=True)
    matrices: Mapping[str, tuple[Packed, ...]] = field(kw_only=True)

    @cached_property
    def fingerprint(self) -> str:
        """The folder's own."""
        return self.base.fingerprint

    def read_range(self, name: str, start: int, stop: int) -> U8:
        """Raw bytes `start:stop` of the repacked tensor.

        Raises:
            CheckpointError: a block's scale is NaN or negative.
        """
        ref = self.ref(name)
        if name not in self.matrices:
            return self.base.read_range(name, start, stop)
        if not 0 <= start <= stop <= ref.size_bytes:
            raise CheckpointError(
                "a read outside the tensor", where=name, got=f"{start}:{stop}", wanted=f"0:{ref.size_bytes}"
            )
        row = tensor_bytes(GgmlType[ref.dtype], ref.shape[-1:])
        first, last = start // row, -(-stop // row)
        parts = [_stored(self.base, one, ref.dtype, *rows) for one, *rows in _spans(self.matrices[name], first, last)]
        return np.concatenate([np.empty(0, np.uint8), *parts])[start - first * row : stop - first * row]


def _spans(matrices: Sequence[Packed], first: int, last: int) -> Iterator[tuple[Packed, int, int]]:
    """What rows `first … last` of a tensor are in each of its matrices."""
    at = 0
    for one in matrices:
        begin, end = max(first - at, 0), min(last - at, one.matrix.rows)
        if begin < end:
            yield one, begin, end
        at += one.matrix.rows


def _stored(base: Checkpoint, one: Packed, dtype: str, first: int, stop: int) -> U8:
    columns = one.matrix.columns
    codes = base.read_range(one.codes.name, first * columns // 2, stop * columns // 2).reshape(stop - first, -1)
    scales = base.read_range(one.scales.name, first * columns // _GROUP, stop * columns // _GROUP)
    if scales.size and scales.max() > _LARGEST_SCALE:
        raise CheckpointError("the scale of a block is NaN or negative", where=one.scales.name, got=hex(scales.max()))
    scales = scales.reshape(stop - first, -1)
    if dtype == "NVFP4":
        return to_blocks(codes, scales).reshape(-1)
    values = dequantise(codes, scales, 1.0)
    return np.ascontiguousarray(values.view("<u2")[:, 1::2]).view(np.uint8).reshape(-1)


def to_blocks(codes: U8, scales: U8) -> U8:
    """GGUF blocks of NVFP4.

    Args:
        codes: [R, F/2], column 2j low and 2j + 1 high.   scales: e4m3 bytes [R, F/16].   F a multiple of 64.
    Returns:
        uint8 [R, F/64, 36].
    """
    rows, count = scales.shape
    pairs = codes.reshape(rows, count, 2, 4)  # columns 0-7 and 8-15 of each 16
    low, high = pairs[:, :, 0], pairs[:, :, 1]
    out = np.empty((rows, count // 4, 36), np.uint8)
    out[:, :, :4] = scales.reshape(rows, -1, 4)
    turned = np.empty((rows, count, 8), np.uint8)
    turned[:, :, 0::2] = low & 15 | high << 4
    turned[:, :, 1::2] = low >> 4 | high & 0xF0
    out[:, :, 4:] = turned.reshape(rows, -1, 32)
    return out


def repack(checkpoint: Checkpoint, asked: str = "NVFP4") -> tuple[RepackedCheckpoint, GgufLayout]:
    """The folder as the exporter reads it, and what its model file holds; headers and global scales only.

    Args:
        asked: one of FILE_TYPES.
    Raises:
        CheckpointError: a part of a matrix is missing or has another form; a global scale is no positive number.
        UsageError: as the family says.
    """
    plain = plain_tensors(checkpoint)
    layout = gguf_layout(plain_config(checkpoint.config), plain.shapes)
    given = {tensor.name: tensor for tensor in layout.tensors}
    tensors: dict[str, GgufTensor] = {}
    refs: dict[str, TensorRef] = {}
    matrices: dict[str, tuple[Packed, ...]] = {}
    for tensor in layout.tensors:
        packed = plain.packed.get(tensor.source or "")
        if packed is None:
            tensors.setdefault(tensor.name, tensor)
            continue
        for part, found in _parts(tensor, packed):
            assert part.source is not None
            matrices[part.source], refs[part.source] = found, _ref(part, found, asked)
            factors = given.get(_beside(part, "scale"))
            tensors[part.name] = part
            for number in _numbers(checkpoint, plain, part, found, factors):
                tensors[number.name] = number
    untouched = {name: ref for name, ref in checkpoint.tensors.items() if name in plain.shapes and name not in refs}
    view = RepackedCheckpoint(
        checkpoint.path, checkpoint.name, checkpoint.config, checkpoint.shards, MappingProxyType(untouched | refs),
        checkpoint.index, base=checkpoint, matrices=MappingProxyType(matrices),
    )  # fmt: skip
    if asked == "NVFP4":
        _say_wide(refs)
    cache = [ref.name for scales in plain.cache.values() for ref in scales]
    left_out = {**layout.left_out, **dict.fromkeys(cache, "scale of an FP8 cache: llama.cpp's has none")}
    metadata = {**layout.metadata, **_precision(plain, tensors, refs)}
    return view, replace(layout, tensors=tuple(tensors.values()), metadata=metadata, left_out=left_out)


def repacked_types(
    view: RepackedCheckpoint, layout: GgufLayout, overrides: Sequence[Override] = ()
) -> dict[str, GgmlType]:
    """Every tensor keeps the type that it has; overrides decide about those that are not NVFP4.

    Raises:
        UsageError: an override decides nothing.
    """
    types = {}
    for tensor in layout.tensors:
        kept = GgmlType.F32 if tensor.source is None else GgmlType[view.ref(tensor.source).dtype]
        types[tensor.name] = unquantised_type(tensor, kept)
    rest = replace(layout, tensors=tuple(one for one in layout.tensors if one.source not in view.matrices))
    return types | decided(rest, overrides)


def _parts(tensor: GgufTensor, packed: tuple[Packed, ...]) -> Iterator[tuple[GgufTensor, tuple[Packed, ...]]]:
    """A tensor of the layout as it is stored packed: fused experts come apart."""
    assert tensor.source is not None
    if _FUSED not in tensor.name:
        yield tensor, packed
        return
    experts, double, hidden = tensor.shape
    for projection, role in _APART.items():
        found = tuple(one for one in packed if one.matrix.module.endswith(f".{projection}"))
        yield (
            replace(
                tensor,
                name=tensor.name.replace(_FUSED, role),
                shape=(experts, double // 2, hidden),
                source=f"{tensor.source.rpartition('.')[0]}.{projection}",
                role=role,
            ),
            found,
        )


def _ref(tensor: GgufTensor, packed: tuple[Packed, ...], asked: str) -> TensorRef:
    dtype = asked if fits(GgmlType[asked], tensor.shape[-1]) else "BF16"
    size, first = tensor_bytes(GgmlType[dtype], tensor.shape), packed[0].codes
    assert tensor.source is not None
    return TensorRef(tensor.source, dtype, tensor.shape, first.shard, first.start, first.start + size)


def _beside(tensor: GgufTensor, tail: str) -> str:
    return f"{tensor.name.removesuffix('.weight')}.{tail}"


def _numbers(
    checkpoint: Checkpoint, plain: Plain, tensor: GgufTensor, packed: tuple[Packed, ...], factors: GgufTensor | None
) -> Iterator[GgufTensor]:
    """`.scale` and `.input_scale` of one tensor.

    Args:
        factors: what the model multiplies the outputs with anyway, one for each expert.
    """
    layout = plain.told.layout
    scales = np.array([1.0 / divisor(checkpoint, one.scale, layout) for one in packed], np.float32)
    if factors is not None and factors.source is not None:
        ref = checkpoint.ref(factors.source)
        known = decode(ref.dtype, checkpoint.read(ref.name))
        if known is None or known.shape != scales.shape:
            raise CheckpointError("not one float for each expert", where=ref.name, got=f"{ref.dtype} {list(ref.shape)}")
        scales = scales * known.astype(np.float32)
    yield _number(tensor, "scale", scales)
    inputs = [one.inputs for one in packed if one.inputs is not None]
    if inputs:
        found = np.array([1.0 / divisor(checkpoint, one, layout) for one in inputs], np.float32)
        yield _number(tensor, "input_scale", found)


def _number(tensor: GgufTensor, tail: str, values: F32) -> GgufTensor:
    name = _beside(tensor, tail)
    return GgufTensor(
        name, values.shape, None, layer=tensor.layer, role=f"{tensor.role}.{tail}", values=values, keep_f32=True
    )


def _precision(plain: Plain, tensors: Mapping[str, GgufTensor], refs: Mapping[str, TensorRef]) -> dict[str, Value]:
    """With weights alone in four bits, what keeps processors that could from rounding activations to four bits, too."""
    narrow = {ref.name for ref in refs.values() if ref.dtype == "NVFP4"}
    if plain.told.scheme == "NVFP4" or not narrow:
        return {}
    names = sorted(tensor.name for tensor in tensors.values() if tensor.source in narrow)
    return {
        "general.quantization_version": Value("u32", QUANTIZATION_VERSION),  # its place is ahead of these
        f"{_EXTRA}.name": Value("str", tuple(names)),
        f"{_EXTRA}.prec_a4": Value("bool", (False,) * len(names)),
    }


def _say_wide(refs: Mapping[str, TensorRef]) -> None:
    wide = [ref for ref in refs.values() if ref.dtype != "NVFP4"]
    if wide:
        log.warning(
            "%d tensors become BF16, without rounding: their rows are no multiple of %d (%d columns in %s)",
            len(wide), _BLOCK, wide[0].shape[-1], wide[0].name,
        )  # fmt: skip


def refuse_other(types: Sequence[str], beside: Mapping[str, bool]) -> None:
    """An NVFP4 folder is stored without rounding, or not at all.

    Args:
        types: file types that are asked for.   beside: option → whether it was given, of those that quantise.
    Raises:
        UsageError: another file type, or an option that means nothing here.
    """
    wanted = f"-t {' or -t '.join(FILE_TYPES)}"
    wrong = [f"-t {asked}" for asked in types if asked not in FILE_TYPES]
    if wrong := wrong or [option for option, given in beside.items() if given]:
        raise UsageError(
            "an NVFP4 checkpoint is stored as it is", got=wrong[0], wanted=wanted,
            hint="all else is made from the checkpoint that it was quantised from",
        )  # fmt: skip
