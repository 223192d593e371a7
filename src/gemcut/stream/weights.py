"""Tensors of a checkpoint into torch, one at a time, by byte range. No file is mapped into memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.nvfp4.plain import Packed, Plain, divisor, read_rows
from gemcut.types import TensorRef

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_READ_BYTES = 1 << 30  # one preadv transfers at most 2 GiB - 4 KiB
_CONVERT_BYTES = 32 << 20
_WARM_BYTES = 4 << 20
_UNPACKED_WEIGHTS = 1 << 20  # of a packed matrix at a time, in float32


def named_dtype(name: str) -> torch.dtype:
    """ "bfloat16", "float16" or "float32". UsageError for anything else."""
    for dtype, known in DTYPE_NAMES.items():
        if name == known:
            return dtype
    raise UsageError("there is no such compute dtype", got=name, wanted=" or ".join(DTYPE_NAMES.values()))


class WeightReader:
    """Reads tensors of one checkpoint in one compute dtype onto one device.

    A tensor that is stored in another dtype is converted in pieces, so that at most 32 MiB exist twice. Names are those
    of plain tensors: where `plain` says that one is packed, its values are.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, plain: Plain | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self._plain = plain
        self._pool: ThreadPoolExecutor | None = None

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor, `[*shape]`, in the compute dtype.

        Raises:
            CheckpointError: it is missing, has another shape, or the file is shorter than its header says.
            UsageError: it is quantised, so that a module of the base architecture cannot hold it.
        """
        if self._plain is not None and (packed := self._plain.packed.get(name)) is not None:
            _check_shape(name, packed[0].codes.shard, self._plain.shapes[name], shape)
            out = self._unpacked(self._plain, packed, shape)
            return out if self.device.type == "cpu" else out.to(self.device)
        ref = self.checkpoint.ref(name)
        _check_shape(name, ref.shard, ref.shape, shape)
        stored = TORCH_DTYPES.get(ref.dtype)
        if stored is None:
            raise UsageError(
                "a quantised tensor cannot run in the model's own modules",
                where=f"{name}, {ref.shard}",
                got=ref.dtype,
                wanted=" or ".join(TORCH_DTYPES),
                hint="observe the unquantised checkpoint",
            )
        with self._open(ref) as fd:
            if stored == self.dtype:
                out = torch.empty(shape, dtype=stored)
                _read_into(fd, ref, 0, out.reshape(-1))
            else:
                out = torch.empty(shape, dtype=self.dtype)
                flat = out.reshape(-1)
                step = _CONVERT_BYTES // stored.itemsize
                piece = torch.empty(min(step, flat.numel()), dtype=stored)
                for first in range(0, flat.numel(), step):
                    part = piece[: flat.numel() - first]
                    _read_into(fd, ref, first * stored.itemsize, part)
                    flat[first : first + part.numel()] = part
        return out if self.device.type == "cpu" else out.to(self.device)

    def _unpacked(self, plain: Plain, packed: Sequence[Packed], shape: tuple[int, ...]) -> torch.Tensor:
        """e2m1 · (s / G) in float32, then the compute dtype: what compressed-tensors makes of the same bytes."""
        out = torch.empty(shape, dtype=self.dtype)
        rows = out.view(-1, shape[-1])
        for one in packed:
            scale = divisor(self.checkpoint, one.scale, plain.told.layout)
            step = max(1, _UNPACKED_WEIGHTS // one.matrix.columns)
            for first in range(0, one.matrix.rows, step):
                stop = min(first + step, one.matrix.rows)
                part = torch.from_numpy(read_rows(self.checkpoint, one, scale, first, stop))
                rows[one.matrix.first + first : one.matrix.first + stop] = part
        return out

    def warm(self, names: Iterable[str]) -> Future[None]:
        """Have the operating system read these tensors ahead, in a thread. Takes page cache, no process memory."""
        refs = []
        for name in names:
            packed = () if self._plain is None else self._plain.packed.get(name, ())
            refs += [part for one in packed for part in (one.codes, one.scales)] or [self.checkpoint.ref(name)]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gemcut-read-ahead")
        return self._pool.submit(self._warm, refs)

    def _warm(self, refs: list[TensorRef]) -> None:
        scratch = memoryview(bytearray(0 if hasattr(os, "posix_fadvise") else _WARM_BYTES))
        for ref in refs:
            with self._open(ref) as fd:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, ref.start, ref.size_bytes, os.POSIX_FADV_WILLNEED)
                else:
                    for at in range(ref.start, ref.stop, _WARM_BYTES):
                        os.preadv(fd, [scratch[: min(_WARM_BYTES, ref.stop - at)]], at)

    @contextlib.contextmanager
    def _open(self, ref: TensorRef) -> Iterator[int]:
        try:
            fd = os.open(self.checkpoint.path / ref.shard, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read a shard: {error.strerror}", where=ref.shard) from None
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """Stop the read-ahead thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _check_shape(name: str, shard: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(stored) != tuple(wanted):
        raise CheckpointError(
            "a tensor and the model's own module disagree about the shape",
            where=f"{name}, {shard}",
            got=list(stored),
            wanted=list(wanted),
        )


def release_freed_memory() -> None:
    """Hand freed heap pages back to the system, where the C library can (glibc keeps over half a GiB otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _read_into(fd: int, ref: TensorRef, offset: int, flat: torch.Tensor) -> None:
    """Fill a contiguous 1-D tensor from `offset` bytes behind the tensor's first byte."""
    if flat.numel() == 0:
        return
    view: memoryview = flat.view(torch.uint8).numpy().data
    start, done = ref.start + offset, 0
    while done < len(view):
        n = os.preadv(fd, [view[done : done + _READ_BYTES]], start + done)
        if n == 0:
            raise CheckpointError(
                "the file ended before the tensor did", where=f"{ref.name}, {ref.shard}", hint="did it change on disk?"
            )
        done += n
