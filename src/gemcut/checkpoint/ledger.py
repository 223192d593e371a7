"""Facts gathered in the background: tensors compared and files hashed by threads while a writer goes on.

hashlib and the reads release the interpreter lock, so a few threads keep every core busy. Everything is read back
from the files; nothing is taken over from the writer's buffers.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from gemcut.checkpoint.compare import Stored, tensor_fact
from gemcut.checkpoint.gather import new_buffer, span
from gemcut.checkpoint.read import Progress
from gemcut.types import Edit, TensorFact, TensorRef

_MAX_PENDING_BYTES = 1 << 30  # a writer never runs further ahead than the page cache can hold


class Stopped(Exception):
    """Another thread failed; this one ends early."""


class RunningHash:
    """sha256 of a file that is still growing, and BLAKE3 of every tensor in it, from one read of its bytes.

    `advance` may be called from any thread, in any order.
    """

    def __init__(self, path: Path, ledger: Ledger, tensors: Sequence[TensorRef] = ()) -> None:
        self._path = path
        self._ledger = ledger
        self._digest = hashlib.sha256()
        self._left = deque(tensors)  # in the order of their bytes, the first one underway
        self._part = blake3()
        self._lock = threading.Lock()
        self._busy = False
        self._target = 0
        self._done = 0
        self.tensors: dict[str, str] = {}  # name → BLAKE3 of those whose bytes were all read

    def advance(self, to: int) -> None:
        """Hash up to byte `to`, unless a thread is on its way there already."""
        with self._lock:
            self._target = max(self._target, to)
            if self._busy:
                return
            self._busy = True
        buffer = new_buffer()
        fd = os.open(self._path, os.O_RDONLY)
        try:
            while True:
                with self._lock:
                    start, stop = self._done, self._target
                    if start == stop:
                        self._busy = False
                        return
                at = start
                for piece in span(fd, start, stop - start, buffer):
                    self._digest.update(piece)
                    self._see(at, piece)
                    at += len(piece)
                    self._ledger.tick()
                with self._lock:
                    self._done = stop
        finally:
            os.close(fd)

    def _see(self, at: int, piece: memoryview) -> None:
        end = at + len(piece)
        while self._left and self._left[0].start <= end:
            ref = self._left[0]
            self._part.update(piece[max(ref.start - at, 0) : max(min(ref.stop, end) - at, 0)])
            if ref.stop > end:
                return
            self.tensors[ref.name] = self._part.hexdigest()
            self._part = blake3()
            self._left.popleft()

    @property
    def behind_bytes(self) -> int:
        """How far reading lags behind what was announced."""
        return self._target - self._done

    def hexdigest(self) -> str:
        """The hash so far. Call it when every `advance` has returned."""
        return self._digest.hexdigest()


class Ledger:
    """Collects facts. Use as a context; `finish` returns when every fact is there."""

    def __init__(self, threads: int | None = None) -> None:
        workers = threads or max(2, min(8, os.cpu_count() or 2))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="facts")
        self._stop = threading.Event()
        self._facts: list[Future[TensorFact]] = []
        self._other: list[Future[None]] = []
        self._pending: dict[Future[Any], int] = {}
        self._files: dict[str, RunningHash] = {}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def tick(self) -> None:
        """Between pieces: ends the thread when the run was given up."""
        if self._stop.is_set():
            raise Stopped

    def compare(self, before: Stored | None, after: Stored | None, hint: Edit | None = None) -> None:
        """Find out what happened to one tensor."""
        size = sum(s.ref.size_bytes for s in (before, after) if s is not None)
        future = self._pool.submit(tensor_fact, before, after, hint, self.tick)
        self._facts.append(future)
        self._hold(future, size)

    def hash_file(self, path: Path, name: str, to: int, tensors: Sequence[TensorRef] = ()) -> None:
        """Hash the first `to` bytes of a file that is recorded as `name`; call again as it grows.

        Args:
            tensors: what lies in the file, in the order of its bytes; each gets a hash of its own.
        """
        running = self._files.get(name)
        if running is None:
            running = self._files[name] = RunningHash(path, self, tensors)
        future = self._pool.submit(running.advance, to)
        self._other.append(future)
        self._hold(future, 0)
        while running.behind_bytes > _MAX_PENDING_BYTES and self._pending:
            wait(self._pending, timeout=0.05, return_when=FIRST_COMPLETED)
            self._hold(future, 0)

    def tensor_hash(self, file: str, tensor: str) -> str:
        """BLAKE3 of a tensor as it was read back. Call it after `finish`."""
        return self._files[file].tensors[tensor]

    def finish(self, progress: Progress | None = None) -> tuple[tuple[TensorFact, ...], dict[str, str]]:
        """Facts in the order they were asked for, and file hashes by sorted name."""
        facts: list[TensorFact] = []
        for future in self._facts:
            facts.append(future.result())
            if progress is not None:
                progress(len(facts), len(self._facts), "comparing")
        for other in self._other:
            other.result()
        return tuple(facts), {name: self._files[name].hexdigest() for name in sorted(self._files)}

    def _hold(self, future: Future[Any], size: int) -> None:
        self._pending[future] = size
        while True:
            for done in [f for f in self._pending if f.done()]:
                del self._pending[done]
                done.result()  # a failure surfaces here, not at the end
            if sum(self._pending.values()) <= _MAX_PENDING_BYTES or len(self._pending) < 2:
                return
            wait(self._pending, return_when=FIRST_COMPLETED)
