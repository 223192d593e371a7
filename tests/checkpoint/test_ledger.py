"""Facts from threads: a growing file hashed once and in order, failures that surface, an end that comes at once."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from gemcut.checkpoint import ledger as ledger_module
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


@pytest.mark.parametrize("sizes", [[5], [0, 3, 0, 0], [4 << 20, 0, 7, (1 << 20) + 1, 0]])
def test_tensors_are_hashed_in_the_same_read(tmp_path: Path, sizes: list[int]) -> None:
    data = random.Random(2).randbytes(11 + sum(sizes))
    (tmp_path / "f").write_bytes(data)
    stops = [11 + sum(sizes[: k + 1]) for k in range(len(sizes))]
    refs = [TensorRef(str(k), "U8", (n,), "f", stops[k] - n, stops[k]) for k, n in enumerate(sizes)]
    with Ledger(threads=3) as ledger:
        for to in (4, 11, 12, len(data) // 3, len(data)):
            ledger.hash_file(tmp_path / "f", "f", to, refs)
        _, files = ledger.finish()
    assert files == {"f": hashlib.sha256(data).hexdigest()}
    for ref in refs:
        assert ledger.tensor_hash("f", ref.name) == blake3(data[ref.start : ref.stop]).hexdigest()


def test_a_writer_does_not_run_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_MAX_PENDING_BYTES", 1 << 20)
    (tmp_path / "f").write_bytes(bytes(64 << 20))
    with Ledger(threads=1) as ledger:
        ledger.hash_file(tmp_path / "f", "f", 64 << 20)
        running = ledger._files["f"]
        ledger.hash_file(tmp_path / "f", "f", 64 << 20)
        assert running.behind_bytes <= 1 << 20
        ledger.finish()


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
