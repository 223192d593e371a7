"""Types chosen by hand: `REGEX=TYPE`, on the command line or in a file of such lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from gemcut.errors import UsageError
from gemcut.export.mix.shapes import quantisable, shaped
from gemcut.export.mix.tables import ALIASES, FILE_TYPES, LARGE_ENDS
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import GgmlType, parse_type

MAX_FILE_BYTES = 16 << 20
_COMMENT = re.compile(r"(^|\s)#.*$")
_NOT_FOR_WEIGHTS = frozenset({GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64, GgmlType.F64})


@dataclass(frozen=True, slots=True)
class Override:
    """Tensors in whose names `pattern` is found get `kind`."""

    pattern: re.Pattern[str]
    kind: GgmlType


def parse_overrides(lines: Iterable[str], *, where: str = "--tensor-type") -> tuple[Override, ...]:
    """`REGEX=TYPE` each; several in a line are parted by spaces, and a # at the start of a word ends the line.

    The pattern is lower-cased and searched for in a tensor's name, as llama-quantize does.

    Raises:
        UsageError: no `=`, no pattern, a pattern that is no regular expression, or no such tensor type.
    """
    found = []
    for number, line in enumerate(lines, 1):
        for word in _COMMENT.sub("", line.rstrip("\r\n")).split():
            found.append(_parse(word, f"{where}, line {number}"))
    return tuple(found)


def read_overrides(path: Path) -> tuple[str, ...]:
    """The overrides in a text file, one `REGEX=TYPE` each.

    Raises:
        UsageError: no such file, not text, larger than 16 MiB, or as `parse_overrides` says.
    """
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_FILE_BYTES + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("a file of tensor types cannot be read", where=path.name, got=str(error)[:120]) from None
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError("a file of tensor types is too large", where=path.name, wanted=f"{MAX_FILE_BYTES} bytes")
    lines = text.splitlines()
    parse_overrides(lines, where=path.name)  # a wrong one is named with its line
    return tuple(word for line in lines for word in _COMMENT.sub("", line).split())


def decided(layout: GgufLayout, overrides: Sequence[Override]) -> dict[str, GgmlType]:
    """Types of the tensors that the overrides decide: first match wins, the shape fallback stays.

    For mixes that are not llama-quantize's own; `stock_types` takes overrides itself, since they change its counting.

    Raises:
        UsageError: an override decides no tensor, or a tensor's shape has no fallback from its type.
    """
    out, bound = {}, set()
    for tensor in layout.tensors:
        match = first_match(overrides, tensor.name)
        if match is not None and quantisable(tensor):
            bound.add(match)
            out[tensor.name] = shaped(overrides[match].kind, tensor)
    refuse_unbound(overrides, bound, layout)
    return out


def first_match(overrides: Sequence[Override], name: str) -> int | None:
    """The number of the first override whose pattern is found in the name."""
    return next((i for i, one in enumerate(overrides) if one.pattern.search(name)), None)


def refuse_unbound(overrides: Sequence[Override], bound: Set[int], layout: GgufLayout) -> None:
    """Every override must have decided a tensor: `bound` are the numbers of those that did.

    Raises:
        UsageError: one matches nothing that can be quantised, or only what something before it has decided.
    """
    for i, one in enumerate(overrides):
        if i in bound:
            continue
        names = [tensor.name for tensor in layout.tensors if quantisable(tensor)]
        hint = f"names look like {names[len(names) // 2]}" if names else "this file has nothing to quantise"
        if any(one.pattern.search(name) for name in names):
            hint = "the file type, or an earlier pattern, decides all its tensors"
        where = f"{one.pattern.pattern}={one.kind.name.lower()}"
        raise UsageError("a pattern of tensor types binds nothing", where=where, hint=hint)


def _parse(word: str, where: str) -> Override:
    pattern, equals, kind = word.partition("=")
    if not (pattern and equals and kind):
        raise UsageError("not a tensor type", where=where, got=word, wanted="REGEX=TYPE, as in attn_k=q6_k")
    try:
        compiled = re.compile(pattern.lower())
    except re.error as error:
        raise UsageError("not a regular expression", where=where, got=f"{pattern}: {error}") from None
    return Override(compiled, _kind(kind, where))


def _kind(text: str, where: str) -> GgmlType:
    try:
        kind = parse_type(text)
    except UsageError as error:
        if text.upper() in (*FILE_TYPES, *LARGE_ENDS, *ALIASES):
            raise UsageError(
                f"{text} is a mix of types for a whole file, not the type of a tensor",
                where=where,
                hint=f"name it with -t {text.upper()}, or give this tensor a type such as iq3_s or q4_k",
            ) from None
        raise UsageError(error.what, where=where, got=text, wanted=error.wanted) from None
    if kind in _NOT_FOR_WEIGHTS:
        raise UsageError("weights are not stored as this type", where=where, got=text)
    return kind
