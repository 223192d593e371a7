"""Experts as wide as blocks of 256: zeros in the file, so that their down-projections can have small types.

Columns that no block of 256 divides fall back to types of 4 bits and more. An expert of 704 made 768 wide computes the
very same: the added rows of gate and up are zero, gelu(0)·0 = 0, and whatever stands in the added columns of down meets
only zeros. It trades bits of the down-projection for 9 % of size; whether that pays, the divergence at equal size says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from gemcut.errors import UsageError
from gemcut.export.imatrix.blocks import Roundings
from gemcut.export.mix.sizes import role_of
from gemcut.export.targets import Importances, Picking
from gemcut.families.gguf import GgufLayout, GgufTensor, Grown, Value
from gemcut.gguf_file import GgufFile, GgufRef
from gemcut.records.curvature import Margins
from gemcut.types import F32, F64

MULTIPLE = 256
SUFFIX = "-padded"  # of file names
WIDTH_KEY = "expert_feed_forward_length"
UNPADDED_KEY = "gemcut.expert_feed_forward_length"  # what it was
_GATE_UP, _DOWN = "ffn_gate_up_exps", "ffn_down_exps"


def pad_experts(layout: GgufLayout, *, multiple: int = MULTIPLE) -> GgufLayout:
    """The layout with experts made wider by zeros, up to a multiple of `multiple`.

    Raises:
        UsageError: a model without experts, experts of several widths, or ones that are such a multiple already.
    """
    key = f"{layout.architecture}.{WIDTH_KEY}"
    said = layout.metadata.get(key)
    if said is None or not isinstance(said.value, int):
        raise UsageError(
            "there are no experts of one width to pad", where=key, got=None if said is None else said.value
        )
    width = said.value
    wide = -(-width // multiple) * multiple
    if wide == width:
        raise UsageError("the experts need no padding", got=f"{width} wide", wanted=f"no multiple of {multiple}")
    tensors = tuple(_grow(tensor, width, wide) for tensor in layout.tensors)
    metadata = {name: Value("u32", wide) if name == key else value for name, value in layout.metadata.items()}
    return replace(layout, tensors=tensors, metadata={**metadata, UNPADDED_KEY: Value("u32", width)})


def would_pad(layout: GgufLayout) -> bool:
    """Whether there are experts whose rows no block of 256 divides, and that few zeros would make so."""
    widths = {tensor.shape[-1] for tensor in layout.tensors if tensor.role == _DOWN}
    return any(0 < -width % MULTIPLE <= width // 4 for width in widths)


def _grow(tensor: GgufTensor, width: int, wide: int) -> GgufTensor:
    if tensor.role == _GATE_UP:
        experts, rows, columns = tensor.shape
        shape, grown = (experts, rows // width * wide, columns), Grown((width, wide), (columns, columns))
    elif tensor.role == _DOWN:
        experts, rows, _ = tensor.shape
        shape, grown = (experts, rows, wide), Grown((rows, rows), (width, wide))
    else:
        return tensor
    return replace(tensor, shape=shape, grown=grown)


def weights_of(file: GgufFile, ref: GgufRef) -> int:
    """Elements of a tensor in a file without the zeros that made its experts wider."""
    elements, width = prod(ref.shape), file.value(UNPADDED_KEY)
    wide = file.value(f"{file.value('general.architecture')}.{WIDTH_KEY}")
    if role_of(ref.name) not in (_GATE_UP, _DOWN) or not isinstance(width, int) or not isinstance(wide, int):
        return elements
    return elements * width // max(wide, 1)


def grow_margins(margins: Margins, grown: Grown) -> Margins:
    """Curvature of a grown tensor: none where zeros stand."""
    units, rows = margins.rows.shape
    runs = margins.rows.reshape(units, rows // grown.rows[0], grown.rows[0])
    return Margins(
        _behind(runs, grown.rows[1]).reshape(units, -1),
        _behind(margins.columns, grown.columns[1]),
    )


def _behind(values: F64, width: int) -> F64:
    """Zeros behind the last axis."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


@dataclass(frozen=True, slots=True, eq=False)
class PaddedImportances:
    """Importances of a padded layout: 0 for columns that meet only zeros.   widths: tensor → columns in the file."""

    importances: Importances
    widths: Mapping[str, int]

    @classmethod
    def of(cls, importances: Importances, layout: GgufLayout) -> PaddedImportances:
        return cls(importances, {t.name: t.shape[-1] for t in layout.tensors if t.grown is not None})

    def importance(self, name: str, unit: int = 0) -> F32 | None:
        """float32 [columns in the file] of one unit."""
        found = self.importances.importance(name, unit)
        width = self.widths.get(name)
        if found is None or width is None or found.shape[0] >= width:
            return found
        return np.concatenate([found, np.zeros(width - found.shape[0], np.float32)])

    def blocks(self, name: str, unit: int = 0) -> Roundings | None:
        """The same of what its blocks are picked from."""
        found = self.importances.blocks(name, unit) if isinstance(self.importances, Picking) else None
        width = self.widths.get(name)
        if found is None or width is None or found.mean.shape[0] >= width:
            return found
        zeros = np.zeros(width - found.mean.shape[0], np.float32)
        return Roundings(
            tuple(np.concatenate([one, zeros]) for one in found.importances),
            np.concatenate([found.mean, zeros]),
            np.concatenate([found.spread, zeros]),
        )
