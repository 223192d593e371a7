"""Open a Hugging Face folder of safetensors: headers and config are read and checked, tensor bytes are not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gemcut.checkpoint.header import Header, parse_object, read_header
from gemcut.errors import CheckpointError, UsageError
from gemcut.families import Family, family_of
from gemcut.store import fingerprint
from gemcut.types import DTYPE_BYTES, Json, Site, TensorRef

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION = "quantization_config"  # in config.json
_PLAIN = ("BF16", "F16", "F32", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAMPLE_BYTES = 4096
_SAMPLE_MAX_BYTES = 65536
_CHUNK_BYTES = 8 << 20

U8 = NDArray[np.uint8]
Progress = Callable[[int, int, str], None]
"""Called with (done, total, label)."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Headers, config and fingerprint of one folder. Tensors are offsets; bytes are read only when asked for.

    `name` is what people and records see (a hub id or the folder's own name); `path` never enters a record.
    `tensors` is ordered by shard, then by offset. `index` is the parsed index file, None for a single file.
    """

    path: Path
    name: str
    config: Mapping[str, Json]
    shards: Mapping[str, Header]
    tensors: Mapping[str, TensorRef]
    index: Mapping[str, Json] | None

    @cached_property
    def family(self) -> Family:
        """What knows this architecture. UsageError where none does."""
        return family_of(self.config)

    @property
    def text_config(self) -> Mapping[str, Json]:
        """The decoder's part of config.json."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every place that can be cut, each checked against the shapes on disk; what is quantised cannot be."""
        return _checked_sites(self)

    @property
    def tied(self) -> bool:
        """The output head is the embedding: config says so and no lm_head is stored."""
        said = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings", True))
        return bool(said) and "lm_head.weight" not in self.tensors

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, headers excepted."""
        return sum(ref.size_bytes for ref in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config, every header fact, the file sizes and one sampled block per tensor.

        Tensors up to 64 KiB are sampled whole; of a larger one, the row of the last axis that lies in the middle
        (at least 4 KiB, at most 64 KiB), so that a fine-tune, a heal or a column mask of the same geometry has
        another fingerprint. It is an identity, not a proof: a change outside the samples is caught by the hashes in
        the manifest. The folder's name and place do not enter.
        """
        samples = hashlib.sha256()
        facts: dict[str, Json] = {}
        for shard, header in self.shards.items():
            facts[shard] = [
                header.size_bytes,
                [[r.name, r.dtype, list(r.shape), r.start - header.data_start] for r in header.tensors],
            ]
            fd = os.open(self.path / shard, os.O_RDONLY)
            try:
                for ref in header.tensors:
                    start, stop = _sample(ref)
                    samples.update(_pread(fd, start, stop - start, shard))
            finally:
                os.close(fd)
        return fingerprint({"config": dict(self.config), "shards": facts, "samples": samples.hexdigest()})

    def ref(self, name: str) -> TensorRef:
        """Where a tensor lies. CheckpointError where it does not exist."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError("the checkpoint has no such tensor", where=name[:200]) from None

    def read(self, name: str) -> U8:
        """The tensor's raw bytes, a fresh array `[size_bytes]`."""
        return self.read_range(name, 0, self.ref(name).size_bytes)

    def read_range(self, name: str, start: int, stop: int) -> U8:
        """Raw bytes `start:stop`, counted from the tensor's first byte."""
        ref = self.ref(name)
        if not 0 <= start <= stop <= ref.size_bytes:
            raise CheckpointError(
                "a read outside the tensor", where=name, got=f"{start}:{stop}", wanted=f"0:{ref.size_bytes}"
            )
        fd = os.open(self.path / ref.shard, os.O_RDONLY)
        try:
            return np.frombuffer(_pread(fd, ref.start + start, stop - start, ref.shard), dtype=np.uint8)
        finally:
            os.close(fd)

    def content_hash(self, name: str) -> str:
        """sha256 of the tensor's bytes, in hex, with a bounded buffer."""
        size = self.ref(name).size_bytes
        digest = hashlib.sha256()
        for start in range(0, size, _CHUNK_BYTES):
            digest.update(self.read_range(name, start, min(size, start + _CHUNK_BYTES)).data)
        return digest.hexdigest()


def open_checkpoint(path: Path, name: str | None = None, *, any_architecture: bool = False) -> Checkpoint:
    """Open a folder: check headers, index, config and, through the family, every shape that a cut relies on.

    Args:
        name: what records call it; the folder's own name by default.
        any_architecture: skip the family (a diff or a hash needs none).
    Raises:
        UsageError: no such folder, or an architecture that no family knows.
        CheckpointError: bytes disagree with a header, the index or the config; weights are pickles.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError("there is no such checkpoint folder", where=str(path))
    if not path.is_dir():
        raise UsageError("a checkpoint is a folder, not a file", where=str(path), hint="name the folder around it")
    config = _read_object(path, CONFIG)
    index, shard_names = _find_shards(path)
    shards = {shard: read_header(path / shard, shard) for shard in shard_names}
    tensors: dict[str, TensorRef] = {}
    for header in shards.values():
        for ref in header.tensors:
            if ref.name in tensors:
                raise CheckpointError(
                    "the same tensor is in two shards", where=ref.name, got=f"{tensors[ref.name].shard}, {ref.shard}"
                )
            tensors[ref.name] = ref
    if index is not None:
        _check_index(index, tensors)
    checkpoint = Checkpoint(
        path, name or path.resolve().name, config, MappingProxyType(shards), MappingProxyType(tensors), index
    )
    if not any_architecture:
        _ = checkpoint.sites
    return checkpoint


def _read_object(path: Path, file: str) -> dict[str, Json]:
    try:
        raw = (path / file).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"the folder has no {file}", where=path.name, hint="is this a model folder?") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}", where=path.name) from None
    return parse_object(raw, file, file)


def _find_shards(path: Path) -> tuple[dict[str, Json] | None, list[str]]:
    if (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            raise CheckpointError(
                "the folder has both one file and an index of shards: two sets of weights",
                where=f"{SINGLE}, {INDEX}",
                hint="remove the one that is not meant",
            )
        index = _read_object(path, INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("the index has no weight_map", where=INDEX)
        names: set[str] = set()
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not _is_plain_name(shard):
                raise CheckpointError(
                    "the index names a shard that is not a plain .safetensors file name",
                    where=f"{tensor[:120]} in {INDEX}",
                    got=repr(shard)[:120],
                )
            names.add(shard)
        return index, sorted(names)
    if (path / SINGLE).exists():
        return None, [SINGLE]
    files = sorted(p.name for p in path.iterdir())
    pickles = [f for f in files if f.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            "the weights are pickles, which are never read",
            where=pickles[0],
            hint="convert them to safetensors, in a place you trust, and point here",
        )
    strays = [f for f in files if f.endswith(".safetensors")]
    raise CheckpointError(
        "the folder has no weights that can be read",
        where=path.name,
        got=", ".join(strays[:3]) or "no .safetensors file",
        wanted=f"{SINGLE}, or shards with {INDEX}",
    )


def _is_plain_name(shard: str) -> bool:
    bad = any(c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in shard)
    return shard.endswith(".safetensors") and not bad and not shard.startswith(".") and len(shard) <= 255


def _check_index(index: Mapping[str, Json], tensors: Mapping[str, TensorRef]) -> None:
    weight_map = index["weight_map"]
    assert isinstance(weight_map, dict)
    for tensor, shard in weight_map.items():
        found = tensors.get(tensor)
        if found is None:
            raise CheckpointError("the index names a tensor that no shard holds", where=tensor[:200], wanted=str(shard))
        if found.shard != shard:
            raise CheckpointError(
                "the index places a tensor in another shard", where=tensor[:200], got=found.shard, wanted=str(shard)
            )
    for tensor, ref in tensors.items():
        if tensor not in weight_map:
            raise CheckpointError("a shard holds a tensor that the index does not name", where=tensor, got=ref.shard)


def _checked_sites(checkpoint: Checkpoint) -> tuple[Site, ...]:
    family = checkpoint.family
    try:
        sites = family.sites(checkpoint.text_config, checkpoint.tensors.keys())
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            "config.json lacks what its architecture needs", where=CONFIG, got=f"{type(error).__name__}: {error}"[:200]
        ) from None
    if QUANTIZATION in checkpoint.config:
        sites = tuple(site for site in sites if all(_plain(checkpoint, cut.name) for cut in site.slices))
    for site in sites:
        for cut in site.slices:
            ref = checkpoint.ref(cut.name)
            if len(ref.shape) <= cut.axis or ref.shape[cut.axis] != site.units * cut.block:
                raise CheckpointError(
                    f"config.json and the weights disagree about the number of {site.kind}",
                    where=f"layer {site.layer}, {cut.name}, {ref.shard}",
                    got=f"shape {list(ref.shape)}",
                    wanted=f"{site.units * cut.block} along axis {cut.axis}",
                )
    return sites


def _plain(checkpoint: Checkpoint, name: str) -> bool:
    ref = checkpoint.tensors.get(name)
    return ref is not None and ref.dtype in _PLAIN


def _sample(ref: TensorRef) -> tuple[int, int]:
    if ref.size_bytes <= _SAMPLE_MAX_BYTES:
        return ref.start, ref.stop
    row = ref.shape[-1] * DTYPE_BYTES[ref.dtype]
    want = max(_SAMPLE_BYTES, min(row, _SAMPLE_MAX_BYTES))
    start = ref.start + (ref.size_bytes // row // 2) * row
    start = min(start, ref.stop - want)
    return start, start + want


def _pread(fd: int, start: int, size: int, shard: str) -> bytearray:
    """Exactly `size` bytes; a file that shrank since its header was read is an error, not a short array."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    done = 0
    while done < size:
        n = os.preadv(fd, [view[done : done + (1 << 30)]], start + done)
        if n == 0:
            raise CheckpointError("the file ended before the tensor did", where=shard, hint="did it change on disk?")
        done += n
    return buffer
