"""Facts gathered in the background: tensors compared and files hashed by threads while a writer goes on.

hashlib and the reads release the interpreter lock, so a few threads keep every core busy. Everything is read back
from the files; nothing is taken over from the writer's buffers.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from gemcut.checkpoint.compare import Stored, tensor_fact
from gemcut.checkpoint.gather import new_buffer, span
from gemcut.checkpoint.read import Progress
from gemcut.types import Edit, TensorFact

_MAX_PENDING_BYTES = 1 << 30  # a writer never runs further ahead than the page cache can hold


class Stopped(Exception):
    """Another thread failed; this one ends early."""


class RunningHash:
    """sha256 of a file that is still growing: `advance` may be called from any thread, in any order."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path = path
        self._ledger = ledger
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()
        self._busy = False
        self._target = 0
        self._done = 0

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
                for piece in span(fd, start, stop - start, buffer):
                    self._digest.update(piece)
                    self._ledger.tick()
                with self._lock:
                    self._done = stop
        finally:
            os.close(fd)

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

    def hash_file(self, path: Path, name: str, to: int) -> None:
        """Hash the first `to` bytes of a file that is recorded as `name`; call again as it grows."""
        running = self._files.get(name)
        if running is None:
            running = self._files[name] = RunningHash(path, self)
        future = self._pool.submit(running.advance, to)
        self._other.append(future)
        self._hold(future, 0)

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
