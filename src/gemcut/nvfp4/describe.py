"""What an NVFP4 folder is, from headers and config.json: scheme, layout, what is packed, how many weights there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.checkpoint.read import Checkpoint
from gemcut.families.base import COMPONENTS
from gemcut.nvfp4.choices import Layout, Scheme
from gemcut.nvfp4.layout import NAMES, is_nvfp4, read_config


@dataclass(frozen=True, slots=True)
class Quantised:
    """linears: how many are packed.   parts: the components that have them.   fp8_cache: keys and values are FP8."""

    scheme: Scheme
    layout: Layout
    linears: int
    parts: tuple[str, ...]
    fp8_cache: bool


def describe(checkpoint: Checkpoint) -> Quantised | None:
    """None for a folder that is not NVFP4.

    Raises:
        CheckpointError: config.json speaks of NVFP4 and does not say what is quantised.
        UsageError: an architecture that no family knows.
    """
    if not is_nvfp4(checkpoint.config):
        return None
    told = read_config(checkpoint.config, checkpoint.name)
    end = NAMES[told.layout].packed
    packed = [name for name, ref in checkpoint.tensors.items() if ref.dtype == "U8" and name.endswith(end)]
    parts = {checkpoint.family.component(name) for name in packed}
    return Quantised(told.scheme, told.layout, len(packed), tuple(p for p in COMPONENTS if p in parts), told.cache)


def weights_by_tensor(checkpoint: Checkpoint) -> Mapping[str, int]:
    """How many of the model's weights each tensor holds: two for a byte of codes, none for the scales of others."""
    counts = {name: ref.elements for name, ref in checkpoint.tensors.items()}
    if not is_nvfp4(checkpoint.config):
        return counts
    names = NAMES[read_config(checkpoint.config, checkpoint.name).layout]
    for name, ref in checkpoint.tensors.items():
        module = name.removesuffix(names.packed)
        if ref.dtype == "U8" and module != name:
            counts[name] *= 2
            for end in (names.scales, names.scale, names.inputs):
                if module + end in counts:
                    counts[module + end] = 0
    return counts
