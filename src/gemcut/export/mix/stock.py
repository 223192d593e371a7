"""The type llama-quantize gives every tensor, for every file type: the tables, the counters, the shape fallback."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from gemcut.errors import UsageError
from gemcut.export.mix.overrides import Override, first_match, refuse_unbound
from gemcut.export.mix.shapes import quantisable, shaped, unquantised_type
from gemcut.export.mix.tables import (
    ALIASES,
    EMBEDDING,
    ENDS,
    FILE_TYPES,
    LARGE_ENDS,
    Q2_K_WANTS_IMATRIX,
    ROLES,
    SMALLEST,
    WANT_IMATRIX,
    FileType,
    Place,
    Role,
)
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.types import BLOCKS, GgmlType

UNQUANTISED = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})
_BLOCK_OF = re.compile(r"blk\.(\d+)\.")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"


def file_types() -> tuple[str, ...]:
    """Every file type's name: llama-quantize's from F32 to Q1_0, then the variants with large ends."""
    return (*FILE_TYPES, *LARGE_ENDS)


def file_type(name: str) -> FileType:
    """A file type by its name, in any case; variants (`Q4_K_L`) are their body's.

    Raises:
        UsageError: no file type has this name.
    """
    asked = name.strip().upper()
    if asked == "NVFP4":
        raise UsageError(
            "NVFP4 files are made from NVFP4 checkpoints", got=f"-t {name}",
            hint="first gemcut nvfp4 MODEL -o FOLDER, then gemcut gguf FOLDER -t NVFP4",
        )  # fmt: skip
    known = FILE_TYPES.get(LARGE_ENDS.get(asked, ALIASES.get(asked, asked)))
    if known is None:
        close = get_close_matches(asked, file_types(), 4, 0.6)
        raise UsageError(
            "no such file type", got=name or "an empty name",
            wanted=", ".join(close) if close else "Q4_K_M, IQ3_M, Q8_0, …",
            hint="llama-quantize's names, or one with large ends, as Q4_K_L",
        )  # fmt: skip
    return known


def stock_types(
    name: str,
    layout: GgufLayout,
    *,
    imatrix: bool,
    overrides: Sequence[Override] = (),
    unquantised: GgmlType = GgmlType.BF16,
) -> dict[str, GgmlType]:
    """Tensor name → the type that llama-quantize would store it in, in the layout's order.

    Args:
        name: a file type, or a variant with token embeddings and output at Q8_0 (`Q4_K_L`).
        imatrix: whether importances are given: some rules depend on it.
        overrides: first match wins; such a tensor takes no part in the counting, but its shape still may change it.
        unquantised: the type of tensors that are not float32 but never quantised.
    Raises:
        UsageError: no such file type, a tensor of a shape for which the type has no fallback, or an override that
            decides nothing (as all of them on F32, F16 and BF16, where llama-quantize does not look at them).
    """
    kind = file_type(name)
    large_ends = name.strip().upper() in LARGE_ENDS
    mix = _Mix(kind, layout, imatrix)
    chosen: dict[str, GgmlType] = {}
    bound: set[int] = set()
    for tensor in sorted(layout.tensors, key=lambda one: file_order(one.name)):
        match = first_match(overrides, tensor.name)
        if not quantisable(tensor):
            chosen[tensor.name] = unquantised_type(tensor, unquantised)
        elif large_ends and _is_end(tensor.name) and (match is None or not tensor.name.startswith("per_layer")):
            chosen[tensor.name] = shaped(GgmlType.Q8_0, tensor)
        elif kind.base in UNQUANTISED:
            chosen[tensor.name] = kind.base
        elif match is None:
            chosen[tensor.name] = shaped(mix.take(tensor), tensor)
        else:
            bound.add(match)
            chosen[tensor.name] = shaped(overrides[match].kind, tensor)
    refuse_unbound(overrides, bound, layout)
    return {tensor.name: chosen[tensor.name] for tensor in layout.tensors}


def starved_of_imatrix(name: str, types: Mapping[str, GgmlType]) -> list[str]:
    """Tensors whose types llama-quantize refuses to write without importances, in the order given."""
    file = file_type(name).name
    return [tensor for tensor, kind in types.items() if wants_imatrix(tensor, kind, file)]


def wants_imatrix(tensor: str, kind: GgmlType, file: str = "") -> bool:
    """Whether this type in this tensor is too small to be chosen without importances."""
    if tensor in (*_EMBEDDINGS, _OUTPUT):
        return False
    return kind in WANT_IMATRIX or (kind is GgmlType.Q2_K and file == Q2_K_WANTS_IMATRIX)


@dataclass(slots=True)
class _Mix:
    """Rules of one file type, and how many tensors of each role have passed."""

    file: FileType
    layout: GgufLayout
    imatrix: bool
    passed: Counter[str] = field(init=False)
    totals: Counter[str] = field(init=False)
    tied: bool = field(init=False)

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.layout.tensors]
        self.passed = Counter()
        self.totals = Counter(role.parts[0] for name in names if (role := _role(name)) is not None)
        self.tied = _OUTPUT not in names

    def take(self, tensor: GgufTensor) -> GgmlType:
        """The type of the next tensor in the file's order, before its shape is looked at."""
        name, file = tensor.name, self.file
        if name == _OUTPUT or (self.tied and name in _EMBEDDINGS):
            if tensor.shape[-1] % BLOCKS[file.base].values:
                return GgmlType.Q8_0
            return ENDS.get(file.name, GgmlType.Q6_K)
        if file.name == "MXFP4_MOE":
            return GgmlType.MXFP4 if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else GgmlType.Q8_0
        if name in _EMBEDDINGS:
            return EMBEDDING.get(file.name, file.base)
        role = _role(name)
        if role is None:
            return file.base
        place = self._place(role, name)
        rules = role.rules.get(file.name, role.otherwise)
        return next((kind for holds, kind in rules if holds(place)), file.base)

    def _place(self, role: Role, name: str) -> Place:
        key = role.parts[0]
        number = self.passed[key]
        self.passed[key] += 1
        by_number = role.counted or self.file.name in SMALLEST or self.layout.experts <= 1
        return Place(
            index=number if by_number else _layer(name),
            count=self.totals[key] if role.counted else self.layout.layers,
            group=self.layout.group,
            experts=self.layout.experts,
            imatrix=self.imatrix,
        )


def _role(name: str) -> Role | None:
    return next((role for role in ROLES if any(part in name for part in role.parts)), None)


def _is_end(name: str) -> bool:
    return name == _OUTPUT or name in _EMBEDDINGS


def _layer(name: str) -> int:
    found = _BLOCK_OF.match(name)
    if found is None:
        raise UsageError("a feed-forward tensor outside of the blocks", where=name, wanted="blk.N.…")
    return int(found.group(1))


def file_order(name: str) -> tuple[int, str]:
    """llama.cpp goes through tensors by layer, then by name, whatever their order in the file."""
    found = _BLOCK_OF.match(name)
    return (int(found.group(1)) if found else -1, name)
