"""Atomic files and folders, hostile JSON, full disks, and kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut import store
from gemcut.errors import CheckpointError, GemcutError, MissingError, UsageError


@pytest.mark.parametrize("name", ["file/a.json", "file/b/a.json", "n" * 300])
def test_a_place_that_takes_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingError, match="cannot write"):
        store.write_bytes(tmp_path / name, b"x")


def test_atomic_file_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    store.write_bytes(path, b"old")
    with store.atomic_file(path) as f:
        f.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_file_failing_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    store.write_bytes(path, b"old")

    def fail() -> None:
        with store.atomic_file(path) as f:
            f.write(b"half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_folder_refuses_existing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UsageError, match="exists already"), store.atomic_folder(out):
        pass
    assert (out / "keep").read_text() == "mine"


def test_atomic_folder_force_swaps(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with store.atomic_folder(out, force=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_failing_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with store.atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_missing_error(tmp_path: Path) -> None:
    # A file size limit gives the same kind of failure as a full disk, and needs no disk of its own.
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom gemcut import store, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    store.write_bytes(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except errors.MissingError as e:\n    print(e)\n    sys.exit(e.exit_code)\n"
    )
    path = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "disk is full" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_need_disk(tmp_path: Path) -> None:
    store.need_disk(tmp_path / "deep" / "er", 1)
    with pytest.raises(MissingError, match="not enough disk"):
        store.need_disk(tmp_path, 1 << 60)


@pytest.mark.parametrize(
    "raw", [b"", b"[1]", b"{", b"\xff{}", b'{"a":1,"a":2}', b'{"a":' + b"[" * 100_000, b"null", b"{}x"]
)
def test_read_json_hostile(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        store.read_json(path, "thing")


def test_read_json_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan"):
        store.read_json(tmp_path / "x.json", "plan")
    with pytest.raises(UsageError, match="folder"):
        store.read_json(tmp_path, "plan")


@given(st.binary(max_size=200))
def test_read_json_any_bytes(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(raw)
    with contextlib.suppress(GemcutError):
        assert isinstance(store.read_json(path, "thing"), dict)


def test_fingerprint_ignores_order_only() -> None:
    assert store.fingerprint({"a": 1, "b": [1, 2]}) == store.fingerprint({"b": [1, 2], "a": 1})
    assert store.fingerprint({"a": 1, "b": [1, 2]}) != store.fingerprint({"a": 1, "b": [2, 1]})
    with pytest.raises(ValueError):
        store.fingerprint({"a": float("nan")})


@pytest.mark.slow
def test_killed_writer_leaves_old_or_new(tmp_path: Path) -> None:
    """Kill a process that replaces one folder again and again; what is left is always one whole generation."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom gemcut import store\nout = Path(sys.argv[1])\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    with store.atomic_folder(out, force=True) as folder:\n"
        "        for i in range(20):\n"
        "            store.write_bytes(folder / str(i), str(n).encode() * 2000)\n"
        "    store.write_json(out.with_suffix('.json'), {'n': n, 'pad': 'x' * 5000})\n"
    )
    out = tmp_path / "out"
    for i in range(20):
        child = subprocess.Popen([sys.executable, "-c", code, str(out)])
        time.sleep(0.25 + 0.013 * i)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        # a kill between the two renames leaves the new generation under its partial name or the old one aside
        whole = out if out.exists() else tmp_path / "out.partial"
        if whole.exists() and (whole != tmp_path / "out.partial"):
            contents = {p.read_bytes() for p in whole.iterdir()}
            assert len(contents) == 1
            assert len(list(whole.iterdir())) == 20
        if (tmp_path / "out.json").exists():
            json.loads((tmp_path / "out.json").read_text())
