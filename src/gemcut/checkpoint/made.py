"""Tensors that come into a new checkpoint without lying in its base: sized first, computed as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from gemcut.errors import CheckpointError
from gemcut.types import DTYPE_BYTES, TensorRef


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """New tensors that lie, one after the other, in the shard of a tensor of the base.

    fill: the bytes of all of them in this order; a piece is valid until the next one is asked for.
    """

    tensors: tuple[TensorRef, ...]  # name, dtype and shape; where they will lie is not said here
    fill: Callable[[], Iterator[memoryview]]

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(DTYPE_BYTES[ref.dtype] * ref.elements for ref in self.tensors)


MadeTensors: TypeAlias = Mapping[str, Made]
"""Name of a tensor of the base → what is put into its shard, ahead of what stays there."""
NO_TENSORS: MadeTensors = {}


def new_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    """A tensor that lies nowhere yet."""
    return TensorRef(name, dtype, shape, "", 0, 0)


def check_made(tensors: Mapping[str, TensorRef], made: MadeTensors, staying: set[str]) -> None:
    """Refuse what has no shard to go to, or a name that is taken.

    Args:
        staying: names that the edits leave in the checkpoint.
    Raises:
        CheckpointError: see above.
    """
    seen = set(staying)
    for name, one in made.items():
        if name not in tensors:
            raise CheckpointError("a new tensor is to lie beside one that does not exist", where=name[:200])
        for ref in one.tensors:
            if ref.name in seen:
                raise CheckpointError("a new tensor has the name of another", where=ref.name)
            seen.add(ref.name)
