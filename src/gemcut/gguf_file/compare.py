"""GGUF tensors as bytes around an axis: what an edit takes of them, and what turned one file into another.

A quantised tensor [..., rows, columns] is seen as bytes [..., rows, blocks, size of a block], so that what slices and
compares safetensors slices and compares blocks; columns can be taken in whole blocks alone. No block is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from blake3 import blake3

from gemcut.checkpoint.compare import Stored
from gemcut.checkpoint.diff import config_changes
from gemcut.checkpoint.ledger import Ledger
from gemcut.checkpoint.read import Progress
from gemcut.errors import UsageError
from gemcut.families.gguf import Value
from gemcut.ggml.types import BLOCKS
from gemcut.gguf_file.header import GgufFile, GgufRef
from gemcut.gguf_file.identity import gguf_fingerprint
from gemcut.records import MANIFEST_SCHEMA
from gemcut.types import Json, Manifest, Take, TensorFact, TensorRef

_LONGEST_SHOWN = 256  # members of an array that a record of changes holds; of longer ones a hash


def as_bytes(file: GgufFile, name: str) -> Stored:
    """A tensor with the file that holds it, its blocks as bytes."""
    ref = file.ref(name)
    return Stored(file.path.with_name(ref.part), _view(ref))


def _view(ref: GgufRef) -> TensorRef:
    block = BLOCKS[ref.kind]
    stop = ref.start + ref.size_bytes
    if block.values == 1:
        return TensorRef(ref.name, ref.kind.name, ref.shape, ref.part, ref.start, stop)
    shape = (*ref.shape[:-1], ref.shape[-1] // block.values, block.size_bytes)
    return TensorRef(ref.name, "U8", shape, ref.part, ref.start, stop)


def take_of_blocks(ref: GgufRef, take: Take) -> Take:
    """A take of rows or columns as a take from `as_bytes`.

    Raises:
        UsageError: it takes a part of a block.
    """
    values = BLOCKS[ref.kind].values
    if take.axis != len(ref.shape) - 1 or values == 1:
        return take
    kept = set(take.index)
    blocks = tuple(sorted({column // values for column in take.index}))
    if len(kept) != len(blocks) * values:
        raise UsageError(
            "these columns cannot be cut without quantising anew",
            where=ref.name,
            got=f"a part of a block of {ref.kind.name}",
            wanted=f"whole blocks of {values} columns",
            hint="cut the safetensors model with this plan, and export that: gemcut gguf MODEL --plan",
        )
    return Take(take.axis, blocks)


def diff_gguf(
    before: GgufFile,
    after: GgufFile,
    *,
    expected: Mapping[str, Take] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """What turned one file into the other: per tensor the edit found, changed metadata, hashes of the other's parts.

    Streams both once with a bounded buffer. Two types are shown as `Q4_K → Q6_K`.

    Args:
        expected: takes of rows and columns tried first where several explain the same bytes; only checked.
    """
    expected = expected or {}
    names = [*before.tensors, *(name for name in after.tensors if name not in before.tensors)]
    with Ledger() as ledger:
        for name in names:
            old, new = before.tensors.get(name), after.tensors.get(name)
            stored = [None if ref is None else as_bytes(file, name) for file, ref in ((before, old), (after, new))]
            hint = expected.get(name)
            if old is not None and new is not None and old.kind is not new.kind:
                # bytes of two types have nothing to do with each other: they are hashed, and no edit is searched
                stored = [_flat(one, dtype) for one, dtype in zip(stored, ("U8", "I8"), strict=True)]
                hint = None
            ledger.compare(stored[0], stored[1], None if hint is None or old is None else take_of_blocks(old, hint))
        for part in after.parts:
            path = after.path.with_name(part)
            ledger.hash_file(path, part, path.stat().st_size)
        facts, files = ledger.finish(progress)
    tensors = tuple(
        _fact(fact, before.tensors.get(name), after.tensors.get(name)) for name, fact in zip(names, facts, strict=True)
    )
    return Manifest(
        schema=MANIFEST_SCHEMA,
        base_fingerprint=gguf_fingerprint(before),
        fingerprint=gguf_fingerprint(after),
        tensors=tensors,
        config_changes=config_changes(plain(before.metadata), plain(after.metadata)),
        files=files,
        size_bytes_before=before.size_bytes,
        size_bytes_after=after.size_bytes,
    )


def _flat(stored: Stored | None, dtype: str) -> Stored | None:
    if stored is None:
        return None
    return Stored(stored.path, replace(stored.ref, dtype=dtype, shape=(stored.ref.size_bytes,)))


def _fact(fact: TensorFact, old: GgufRef | None, new: GgufRef | None) -> TensorFact:
    """The fact about the bytes, in rows and columns."""
    ref = new or old
    assert ref is not None
    shapes = (None if old is None else old.shape, None if new is None else new.shape)
    said = partial(replace, fact, shape_before=shapes[0], shape_after=shapes[1])
    if old is not None and new is not None and old.kind is not new.kind:
        found = "values" if old.shape == new.shape else "reshaped"
        return said(
            found=found, dtype=f"{old.kind.name} → {new.kind.name}", relative_change=None, axis=None, index=None
        )
    values = BLOCKS[ref.kind].values
    if values == 1:
        return said(dtype=ref.kind.name)
    axis, index, found = fact.axis, fact.index, fact.found
    if axis is not None and axis >= len(ref.shape):  # inside of blocks: nothing that has a meaning
        axis, index, found = None, None, "values" if old is not None and old.shape == ref.shape else "reshaped"
    elif axis == len(ref.shape) - 1 and index is not None:
        index = tuple(block * values + i for block in index for i in range(values))
    return said(dtype=ref.kind.name, found=found, axis=axis, index=index, relative_change=None)


def plain(metadata: Mapping[str, Value]) -> dict[str, Json]:
    """Metadata as JSON; of a vocabulary its length and hash."""
    return {key: _json(value.value) for key, value in metadata.items()}


def _json(value: int | float | bool | str | Sequence[int | float | bool | str]) -> Json:
    if not isinstance(value, tuple):
        return _number(value) if isinstance(value, int | float | str) else None
    if len(value) <= _LONGEST_SHOWN:
        return [_number(one) for one in value]
    return f"{len(value)} values, blake3 {blake3(repr(value).encode()).hexdigest()}"


def _number(value: float | str) -> Json:
    finite = not isinstance(value, float) or abs(value) < float("inf")  # JSON has no NaN and no infinity
    return value if finite else repr(value)
