"""One layout of an NVFP4 checkpoint into the other: the same codes and block scales, 1 / G for G, other names."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemcut.checkpoint import Checkpoint, write_checkpoint
from gemcut.checkpoint.made import Made, new_tensor
from gemcut.checkpoint.read import Progress
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.nvfp4.choice import exclude_wildcards, ignore_patterns
from gemcut.export.nvfp4.record import CONVERTED, RECORD
from gemcut.export.nvfp4.served import check_served
from gemcut.nvfp4.choices import Layout
from gemcut.nvfp4.layout import (
    HF_QUANT,
    NAMES,
    RECIPE,
    Names,
    Told,
    config_with,
    hf_quant_config,
    read_config,
    recipe_text,
)
from gemcut.nvfp4.plain import plain_tensors
from gemcut.store import read_json
from gemcut.types import Edit, Json, Manifest, Omit, Rename, TensorRef

_CACHE: Mapping[Layout, tuple[str, str]] = {
    "compressed-tensors": (".k_scale", ".v_scale"),
    "modelopt": (".k_proj.k_scale", ".v_proj.v_scale"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """What a conversion would do.   inexact: scales whose reciprocal's reciprocal is another float32."""

    source: Checkpoint
    told: Told
    layout: Layout
    modules: int
    inexact: int
    edits: Mapping[str, Edit]
    made: Mapping[str, Made]
    ignore: tuple[str, ...]  # in the new layout
    patterns: tuple[str, ...]  # as recipe.yaml has them


@dataclass(slots=True)
class _Turned:
    """Tensors of the new folder while they are collected."""

    edits: dict[str, Edit] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    inexact: int = 0

    def number(self, ref: TensorRef, raw: bytes, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """A number in place of another."""
        self.edits[ref.name] = Omit()
        self.made[ref.name] = Made((new_tensor(name, dtype, shape),), _giving(raw))


def plan_conversion(source: Checkpoint, layout: Layout) -> Conversion:
    """Decide; reads headers and scales.

    Raises:
        UsageError: the folder has this layout already.
        CheckpointError: it is no NVFP4 checkpoint, or a scale is no positive number.
    """
    told = read_config(source.config, source.name)
    if told.layout == layout:
        raise UsageError("the folder has this layout already", where=source.name, got=layout)
    old, new = NAMES[told.layout], NAMES[layout]
    plain = plain_tensors(source)
    modules = [packed.matrix.module for found in plain.packed.values() for packed in found]
    turned = _Turned()
    for module in modules:
        _turn_module(source, module, old, new, turned)
    for name, ref in source.tensors.items():
        for before, after in zip(_CACHE[told.layout], _CACHE[layout], strict=True):
            if told.cache and name.endswith(f".self_attn{before}"):
                path = name.removesuffix(before)
                turned.number(ref, *_cache_number(source, ref, layout, path + after))
    groups = plain.groups
    there = set(modules)
    chosen = [group for group in groups if all(matrix.module in there for matrix in group.matrices)]
    linears = source.family.linears()
    patterns = ignore_patterns(source, groups, chosen, linears)
    ignore = patterns if layout == "compressed-tensors" else exclude_wildcards(source, groups, chosen, linears)
    rules = ignore if layout == "compressed-tensors" else tuple("re:" + fnmatch.translate(one) for one in ignore)
    check_served(rules, groups, there, ["lm_head"], linears)
    return Conversion(source, told, layout, len(modules), turned.inexact, turned.edits, turned.made, ignore, patterns)


def convert(
    meant: Conversion, out: Path, *, force: bool = False, link: bool = True, progress: Progress | None = None
) -> Manifest:
    """Write the folder; see `write_checkpoint`."""
    source, told = meant.source, meant.told
    config = config_with(source.config, told.scheme, meant.layout, meant.ignore, kv=told.cache)
    report = write_checkpoint(
        source, meant.edits, config, out,
        force=force, link=link, made=meant.made, files=lambda: _files(meant), progress=progress,
    )  # fmt: skip
    return report.manifest


def _turn_module(source: Checkpoint, module: str, old: Names, new: Names, turned: _Turned) -> None:
    turned.edits[module + old.packed] = Rename(module + new.packed)
    for before, after in ((old.scale, new.scale), (old.inputs, new.inputs)):
        ref = source.tensors.get(module + before)
        if ref is None:
            continue
        if ref.dtype != "F32" or ref.elements != 1:
            raise CheckpointError("a scale is not one float32", where=ref.name, got=f"{ref.dtype} {list(ref.shape)}")
        value = source.read(ref.name).view("<f4")[0]
        with np.errstate(divide="ignore"):
            other = np.float32(1) / value
            turned.inexact += bool(np.float32(1) / other != value)
        if not (np.isfinite(value) and np.isfinite(other) and value > 0):
            raise CheckpointError("a scale is no positive number", where=ref.name, got=float(value))
        turned.number(ref, other.astype("<f4").tobytes(), module + after, "F32", new.scalar)


def _cache_number(
    source: Checkpoint, ref: TensorRef, layout: Layout, name: str
) -> tuple[bytes, str, str, tuple[int, ...]]:
    """BF16 as float32, or the other way where nothing is lost."""
    raw = source.read(ref.name).tobytes()
    if (layout == "modelopt" and ref.dtype != "BF16") or (layout != "modelopt" and ref.dtype != "F32"):
        raise CheckpointError("a scale of the cache has another form", where=ref.name, got=ref.dtype)
    if layout == "modelopt":
        return b"\0\0" + raw, name, "F32", ()
    if raw[:2] != b"\0\0":
        raise CheckpointError("a scale of the cache is no BF16: it would change", where=ref.name)
    return raw[2:], name, "BF16", (1,)


def _giving(raw: bytes) -> Callable[[], Iterator[memoryview]]:
    return lambda: iter((memoryview(raw),))


def _files(meant: Conversion) -> dict[str, bytes | None]:
    told = meant.told
    out: dict[str, bytes | None] = {RECIPE: recipe_text(told.scheme, meant.patterns, kv=told.cache).encode()}
    out[HF_QUANT] = None
    if meant.layout == "modelopt":
        out[HF_QUANT] = _json(hf_quant_config(told.scheme, meant.ignore, kv=told.cache))
    record = meant.source.path / RECORD
    if record.is_file():
        said = read_json(record, "record of an NVFP4 export")
        out[RECORD] = _json({**said, "layout": meant.layout, "ignore": list(meant.ignore), CONVERTED: told.layout})
    return out


def _json(value: Mapping[str, Json]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
