"""What fills a GGUF tensor, in pieces of rows: read, hashed, turned into float32, checked to be finite."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from gemcut.checkpoint import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gguf import GgufTensor, Grown
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.types import F32

# Elements of one piece: 2 MiB of float32, which a core's cache holds while each target quantises it. A change of this
# number changes the hashes that `source_hash` puts together, so earlier exports are then not found again.
PIECE_ELEMENTS = 1 << 19
_WHOLE_MAX_BYTES = 256 << 20  # a tensor whose axes are exchanged is read whole
_FLOATS = ("BF16", "F16", "F32")
_PACKED = "NVFP4"  # GGUF blocks, which go into the file as they are

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first … stop` of a tensor seen as [rows, columns], all leading axes in one."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """values: float32 [rows, columns], valid until the same thread loads the next piece; of packed ones no row.

    raw: the bytes on disk, or None where the values are not stored as they are.   digest: of those bytes.
    """

    values: F32
    raw: U8 | None
    dtype: str
    digest: bytes


class Buffers(threading.local):
    """Room for one piece of float32 a thread; fresh memory for each piece would cost more than the conversion."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint16]] = {}

    def halves(self, dtype: str, count: int) -> NDArray[np.uint16]:
        """[count, 2]: low and high half of each float32. Zero at first, and the user's from then on."""
        held = self._held.get(dtype)
        if held is None or len(held) < count:
            held = self._held[dtype] = np.zeros((count, 2), np.uint16)
        return held[:count]


@dataclass(slots=True, eq=False)
class Source:
    """One tensor of the layout and the checkpoint that fills it."""

    checkpoint: Checkpoint
    tensor: GgufTensor
    buffers: Buffers
    dtype: str = field(init=False)
    _whole: tuple[F32, bytes] | None = field(init=False, default=None)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        tensor = self.tensor
        if tensor.source is None:
            if tensor.values is None or tensor.values.shape != tensor.shape:
                raise CheckpointError("the layout gives a tensor neither a source nor values", where=tensor.name)
            self.dtype = "F32"
            return
        ref = self.checkpoint.ref(tensor.source)
        self.dtype = ref.dtype
        if ref.dtype not in (*_FLOATS, _PACKED):
            raise UsageError(
                "only float tensors become GGUF", where=tensor.source, got=ref.dtype, wanted=" or ".join(_FLOATS)
            )
        if ref.elements != tensor.weights or (
            tensor.permute
            and (prod(self._stored) != ref.elements or sorted(tensor.permute) != list(range(len(self._stored))))
        ):
            raise CheckpointError(
                "the layout and the weights disagree",
                where=tensor.source,
                got=list(ref.shape),
                wanted=list(tensor.shape),
            )
        if tensor.permute and ref.size_bytes > _WHOLE_MAX_BYTES:
            raise UsageError(
                "too large a tensor to exchange its axes", where=tensor.source, got=f"{ref.size_bytes} bytes"
            )

    @property
    def _stored(self) -> tuple[int, ...]:
        """The shape on disk, or how the layout sees it before it exchanges axes."""
        assert self.tensor.source is not None
        return self.tensor.source_shape or self.checkpoint.ref(self.tensor.source).shape

    @property
    def columns(self) -> int:
        return self.tensor.shape[-1] if self.tensor.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.tensor.shape[:-1])

    @property
    def size_bytes(self) -> int:
        """On disk; 0 of values that no checkpoint stores."""
        return 0 if self.tensor.source is None else self.checkpoint.ref(self.tensor.source).size_bytes

    @property
    def place(self) -> tuple[str, int]:
        """Shard and offset: the order in which the disk is read."""
        if self.tensor.source is None:
            return ("", 0)
        ref = self.checkpoint.ref(self.tensor.source)
        return (ref.shard, ref.start)

    def pieces(self) -> Iterator[Piece]:
        """Runs of whole rows that cover the tensor."""
        return pieces_of(self.tensor.shape)

    def load(self, piece: Piece) -> Loaded:
        """Read one piece; from any thread.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file ends early.
        """
        if self.tensor.source is None or self.tensor.permute:
            values, digest = self._all()
            return Loaded(values[piece.first : piece.stop], None, "F32", digest)
        if self.tensor.grown is not None:
            return self._grown(piece, self.tensor.grown)
        raw = self._read(piece)
        values = self._floats(raw).reshape(-1, self.columns)
        self._check(values, piece)
        return Loaded(values, raw, self.dtype, blake3(raw.data).digest())

    def hash(self, piece: Piece) -> bytes:
        """The digest that `load` would give, without the values."""
        if self.tensor.source is None or self.tensor.permute:
            return self._all()[1]
        if self.tensor.grown is not None:
            digest = blake3()
            for stored, _ in _stored_rows(piece, self.tensor.grown):
                digest.update(self._read(stored).data)
            return digest.digest()
        return blake3(self._read(piece).data).digest()

    def _grown(self, piece: Piece, grown: Grown) -> Loaded:
        """The piece with its zeros; they are the file's, and stand in no digest."""
        values = np.zeros((piece.stop - piece.first, self.columns), np.float32)
        digest = blake3()
        for stored, at in _stored_rows(piece, grown):
            raw = self._read(stored)
            digest.update(raw.data)
            part = self._floats(raw).reshape(-1, grown.columns[0])
            self._check(part, stored)
            values[at : at + len(part), : grown.columns[0]] = part
        return Loaded(values, None, "F32", digest.digest())

    def _read(self, piece: Piece) -> U8:
        """Rows as they are stored."""
        assert self.tensor.source is not None
        columns = self.columns if self.tensor.grown is None else self.tensor.grown.columns[0]
        row = tensor_bytes(GgmlType[self.dtype], (columns,))
        return self.checkpoint.read_range(self.tensor.source, piece.first * row, piece.stop * row)

    def _floats(self, raw: U8) -> F32:
        """float32 of the bytes; of 16-bit ones in this thread's buffer."""
        if self.dtype == _PACKED:
            return np.empty(0, np.float32)
        if self.dtype == "F32":
            return raw.view("<f4")
        halves = self.buffers.halves(self.dtype, raw.size // 2)
        values = halves.view("<f4").reshape(-1)
        if self.dtype == "BF16":
            halves[:, 1] = raw.view("<u2")  # the low halves stay zero
        else:
            np.copyto(values, raw.view("<f2"))
        return values

    def _all(self) -> tuple[F32, bytes]:
        with self._lock:
            if self._whole is None:
                if self.tensor.values is not None and self.tensor.source is None:
                    values = np.ascontiguousarray(self.tensor.values, "<f4")
                    self._whole = (values.reshape(-1, self.columns), blake3(values.view(np.uint8).data).digest())
                else:
                    assert self.tensor.source is not None
                    raw = self.checkpoint.read(self.tensor.source)
                    stored = self._floats(raw).reshape(self._stored).transpose(self.tensor.permute)
                    values = np.array(stored, "<f4", order="C").reshape(-1, self.columns)
                    self._check(values, Piece(0, len(values)))
                    self._whole = (values, blake3(values.view(np.uint8).data).digest())  # as turned, not as stored
            return self._whole

    def _check(self, values: F32, piece: Piece) -> None:
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise CheckpointError(
                "a weight is NaN or infinite",
                where=f"{self.tensor.source or self.tensor.name}, row {piece.first + row}, column {column}",
                got=float(values[row, column]),
                hint="the checkpoint is damaged, or was trained into the ground",
            )


def pieces_of(shape: tuple[int, ...]) -> Iterator[Piece]:
    """Runs of whole rows that cover a tensor of this shape, rows first."""
    rows, step = prod(shape[:-1]), max(1, PIECE_ELEMENTS // max(prod(shape[-1:]), 1))
    for first in range(0, rows, step):
        yield Piece(first, min(first + step, rows))


def _stored_rows(piece: Piece, grown: Grown) -> Iterator[tuple[Piece, int]]:
    """Rows on disk that lie in a piece of the file, and which row of the piece the first of them is."""
    stored, filed = grown.rows
    for run in range(piece.first // filed, -(-piece.stop // filed)):
        first = max(piece.first - run * filed, 0)
        stop = min(piece.stop - run * filed, stored)
        if first < stop:
            yield Piece(run * stored + first, run * stored + stop), run * filed + first - piece.first


def source_hash(digests: list[bytes]) -> str:
    """One hash of a tensor's pieces, in hex."""
    return blake3(b"".join(digests)).hexdigest()
