"""Facts from threads: a growing file hashed once and in order, failures that surface, an end that comes at once."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gemcut.checkpoint.compare import Stored
from gemcut.checkpoint.ledger import Ledger, RunningHash
from gemcut.errors import CheckpointError
from gemcut.types import TensorRef


def stored(path: Path, size: int, start: int = 0) -> Stored:
    return Stored(path, TensorRef(path.name, "U8", (size,), path.name, start, start + size))


def test_a_growing_file_is_hashed_in_order_from_any_thread(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(9 << 20)
    path = tmp_path / "f"
    path.touch()
    with Ledger(threads=4) as ledger, open(path, "ab", buffering=0) as f:
        at = 0
        while at < len(data):
            n = random.Random(at).randrange(1, 400_000)
            f.write(data[at : at + n])
            at = min(len(data), at + n)
            ledger.hash_file(path, "f", at)
            ledger.hash_file(path, "f", at // 2)  # a late caller with an old length
        _, files = ledger.finish()
    assert files == {"f": hashlib.sha256(data).hexdigest()}


def test_advance_from_many_threads_at_once(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(4 << 20)
    (tmp_path / "f").write_bytes(data)
    with Ledger() as ledger:
        running = RunningHash(tmp_path / "f", ledger)
        points = [len(data) * k // 20 for k in range(1, 21)]
        threads = [threading.Thread(target=running.advance, args=(p,)) for p in points]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert running.hexdigest() == hashlib.sha256(data).hexdigest()


def test_facts_come_in_the_order_they_were_asked_for(tmp_path: Path) -> None:
    with Ledger(threads=3) as ledger:
        for k in range(30):
            path = tmp_path / f"{k:02d}"
            path.write_bytes(np.full((k * 7919) % 50_000 + 1, k, np.uint8).tobytes())
            ledger.compare(stored(path, path.stat().st_size), None)
        facts, _ = ledger.finish()
    assert [fact.name for fact in facts] == [f"{k:02d}" for k in range(30)]


def test_a_failure_in_a_thread_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")

    def run() -> None:
        with Ledger() as ledger:
            ledger.compare(stored(tmp_path / "short", 100), None)
            ledger.finish()

    with pytest.raises(CheckpointError, match="ended before"):
        run()


def test_giving_up_stops_the_threads(tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as f:
        f.truncate(8 << 30)  # sparse: seconds of hashing that nobody waits for
    start = time.process_time()
    with Ledger() as ledger:
        ledger.compare(stored(tmp_path / "big", 8 << 30), None)
    assert time.process_time() - start < 1.0
