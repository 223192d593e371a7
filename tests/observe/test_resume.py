"""A killed pass goes on behind its last finished layer, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.observe.conftest import make_corpus

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import UsageError
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from gemcut.stream.corpus import Corpus
from stopping import Stop, contents, stop_at

Tiny = Callable[[str], Checkpoint]
SETTINGS = ObserveSettings(dtype="float32", batch_tokens=64)
KILLS = 50


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(6)


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return observe(tiny("moe"), corpus, tmp_path_factory.mktemp("whole") / "stats", settings=SETTINGS)


@pytest.mark.parametrize("label", ["layer 0", "layer 3", "layer 5"])
def test_a_stopped_pass_goes_on(tiny: Tiny, corpus: Corpus, undisturbed: Path, tmp_path: Path, label: str) -> None:
    out = tmp_path / "stats"
    with pytest.raises(Stop):
        observe(tiny("moe"), corpus, out, settings=SETTINGS, progress=stop_at(label))
    assert not out.exists()
    seen: list[str] = []
    observe(tiny("moe"), corpus, out, settings=SETTINGS, progress=lambda done, total, said: seen.append(said))
    assert seen[0] == label  # no finished layer runs again
    assert contents(out) == contents(undisturbed)


def test_an_unfinished_pass_of_something_else_needs_force(
    tiny: Tiny, corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats"
    with pytest.raises(Stop):
        observe(tiny("moe"), make_corpus(3, seed=8), out, settings=SETTINGS, progress=stop_at("layer 2"))
    with pytest.raises(UsageError, match="unfinished observation of another"):
        observe(tiny("moe"), corpus, out, settings=SETTINGS)
    observe(tiny("moe"), corpus, out, settings=SETTINGS, force=True)
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize("damage", ["hidden", "layer", "progress", "all of it"])
def test_a_damaged_remainder_is_thrown_away(
    tiny: Tiny, corpus: Corpus, undisturbed: Path, tmp_path: Path, damage: str
) -> None:
    out, partial = tmp_path / "stats", tmp_path / "stats.partial"
    with pytest.raises(Stop):
        observe(tiny("moe"), corpus, out, settings=SETTINGS, progress=stop_at("layer 2"))
    if damage == "hidden":
        (partial / "hidden-002.bin").unlink()
    elif damage == "layer":
        (partial / "layer-001.safetensors").unlink()
    elif damage == "progress":
        (partial / "progress.json").write_text("{")
    else:
        (partial / "progress.json").unlink()
    observe(tiny("moe"), corpus, out, settings=SETTINGS)
    assert contents(out) == contents(undisturbed)


def run_child(checkpoint: Checkpoint, corpus: Corpus, out: Path) -> int:
    """Observe in a forked child; torch is imported already. Returns the child's id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            observe(checkpoint, corpus, out, settings=SETTINGS)
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_fifty_kills_at_random_moments(tiny: Tiny, corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL, again and again, each time somewhere else; whenever a pass gets through, its bytes are compared."""
    checkpoint, wanted = tiny("moe"), contents(undisturbed)
    out, rng = tmp_path / "stats", random.Random(0)
    began = time.monotonic()
    os.waitpid(run_child(checkpoint, corpus, out), 0)
    whole = time.monotonic() - began
    kills = 0
    assert contents(out) == wanted
    while kills < KILLS:
        shutil.rmtree(out, ignore_errors=True)
        while not out.exists():
            pid = run_child(checkpoint, corpus, out)
            deadline = time.monotonic() + rng.uniform(0.0, 0.6 * whole)
            while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            try:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                status = 0  # it was through before
            kills += os.WIFSIGNALED(status)
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
            if kills >= KILLS:
                break
        if out.exists():
            assert contents(out) == wanted
    os.waitpid(run_child(checkpoint, corpus, out), 0)
    assert contents(out) == wanted
    assert not out.with_name("stats.partial").exists()
