"""What of an existing GGUF file can be cut, as its family states it from the file's own header."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gemcut.families.base import Attention
from gemcut.families.gguf import Value
from gemcut.types import Site

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class GgufCuts:
    """Tensors are named as the file names them, shapes rows first.

    experts: layer → where experts are sliced.   top_k: experts of a token.
    attention(): layer → head counts, counted in the shapes; raises where heads cannot leave this file.
    after(shapes): keys that say another number once the tensors have these shapes.
    """

    experts: Mapping[int, Site]
    top_k: int
    attention: Callable[[], Mapping[int, Attention]]
    after: Callable[[Shapes], Mapping[str, Value]]
