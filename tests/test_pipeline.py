"""Recipe to report on a tiny checkpoint: order, resume, what a change redoes, locks, gates, kills."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemcut import pipeline, preflight, recipe
from gemcut.errors import QualityError, UsageError
from tiny import make_tiny, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_tiny(folder / "base", "moe")
    write_corpus(folder / "calibration.jsonl", 1)
    write_corpus(folder / "heldout.jsonl", 2)
    return folder


def words(place: Path, *sets: str) -> recipe.Recipe:
    return recipe.build(
        {
            "name": "tiny",
            "model": str(place / "base"),
            "observe": {"corpus": str(place / "calibration.jsonl"), "dtype": "float32"},
            "score": "reap",
            "compare": ["frequency"],
            "plan": {"keep": 5, "guards": {"bootstrap": 20}},
            "kld": {"corpus": str(place / "heldout.jsonl"), "dtype": "float32"},
        }
    ) if not sets else recipe.parse(recipe.resolved(words(place)), "tiny", sets)  # fmt: skip


def names(run: pipeline.Run, *, reused: bool) -> list[str]:
    return [stage.folder.name.rsplit("-", 1)[0] for stage in run.done if stage.reused is reused]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def test_runs_end_to_end_and_again_for_free(place: Path, tmp_path: Path) -> None:
    before = snapshot(place)
    first = pipeline.run(words(place), tmp_path)
    assert names(first, reused=False) == [
        "observe", "plan-reap", "plan-frequency", "cut-reap", "cut-frequency", "verify-reap", "kld",
    ]  # fmt: skip
    assert first.report is not None
    assert "<svg" in first.report.read_text()
    assert first.measured is not None
    assert set(first.measured) == {"reap", "frequency"}
    again = pipeline.run(words(place), tmp_path)
    assert names(again, reused=False) == []
    assert snapshot(place) == before, "inputs were touched"


def test_a_change_redoes_what_depends_on_it(place: Path, tmp_path: Path) -> None:
    pipeline.run(words(place), tmp_path, until="cut")
    other = pipeline.run(words(place, "plan.keep=4"), tmp_path, until="cut")
    assert names(other, reused=True) == ["observe"]
    back = pipeline.run(words(place), tmp_path, until="cut")
    assert names(back, reused=False) == []


def test_until_and_unknown_stage(place: Path, tmp_path: Path) -> None:
    run = pipeline.run(words(place), tmp_path, until="plan")
    assert run.model is None
    assert names(run, reused=False) == ["observe", "plan-reap", "plan-frequency"]
    with pytest.raises(UsageError, match="no such stage"):
        pipeline.run(words(place), tmp_path, until="lunch")


def test_gate_keeps_the_work(place: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match="KLD gate") as caught:
        pipeline.run(words(place, "kld.max_mean_nats=0.0000001"), tmp_path)
    assert "n = " in str(caught.value)
    assert (tmp_path / "tiny" / "report" / "index.html").is_file()


def test_two_runs_in_one_folder_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with open(tmp_path / "tiny" / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another gemcut"):
            pipeline.run(words(place), tmp_path)


def test_same_label_twice_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="same name"):
        pipeline.run(words(place, "compare=[reap]"), tmp_path)


def test_keeping_fewer_than_top_k_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fewer experts"):
        pipeline.run(words(place, "plan.keep=1"), tmp_path)


def test_records_name_no_place(place: Path, tmp_path: Path) -> None:
    run = pipeline.run(words(place), tmp_path)
    for path in run.folder.rglob("*"):
        if path.is_file() and path.suffix in {".json", ".html", ".md", ".svg"} and "model" not in path.parts:
            text = path.read_text()
            assert str(place) not in text, path.name
            assert str(tmp_path) not in text, path.name


def test_preflight_counts_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    found = preflight.estimate(words(place), tmp_path / "runs")
    assert [stage.name for stage in found.stages] == ["observe", "plan", "cut", "verify", "kld", "report"]
    assert not (tmp_path / "runs").exists()
    base = sum(p.stat().st_size for p in (place / "base").glob("*.safetensors"))
    cut = next(stage for stage in found.stages if stage.name == "cut")
    assert 0.3 * base < cut.write_bytes / 2 < base
    run = pipeline.run(words(place), tmp_path / "runs", until="cut")
    assert run.model is not None
    written = sum(p.stat().st_size for p in run.model.glob("*.safetensors"))
    assert abs(written - cut.write_bytes / 2) < 0.05 * written


KILLED = """
import sys
from pathlib import Path
from gemcut import pipeline, recipe
pipeline.run(recipe.load(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(place: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe.resolved(words(place)))
    whole = pipeline.run(words(place), tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r.yaml"), str(tmp_path / "killed")]
    rng = random.Random(0)
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    length = time.monotonic() - start
    import shutil

    shutil.rmtree(tmp_path / "killed")
    for _ in range(8):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.4, 1.0) * length)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    killed = pipeline.run(words(place), tmp_path / "killed")
    for a, b in zip(whole.done, killed.done, strict=True):
        assert a.key == b.key
        for path in a.folder.rglob("*"):
            if path.is_file() and path.name != "stage.json":
                assert (b.folder / path.relative_to(a.folder)).read_bytes() == path.read_bytes(), path.name


def test_a_heal_of_the_chosen_criterion(place: Path, tmp_path: Path) -> None:
    """Only its cut is healed; the other criterion's cut, and everything before, stay as they were."""
    plain = pipeline.run(words(place), tmp_path)
    before = {s.folder.name: s.key for s in plain.done}
    text = write_corpus(place / "heal.jsonl", 3, 40)
    sets = (f"heal={{dtype: float32, corpus: {text}}}",)
    run = pipeline.run(words(place, *sets), tmp_path)
    assert names(run, reused=False) == ["heal", "cut-reap", "verify-reap", "kld"]
    assert {s.folder.name for s in run.done if s.reused} <= before.keys()
    report = json.loads(next(tmp_path.glob("tiny/heal-*/healed/heal.json")).read_text())
    used = {one["tensor"] for one in report["layers"] if one["used"]}
    assert used
    assert run.model is not None
    facts = json.loads((run.model / "manifest.json").read_text())["tensors"]
    assert {fact["name"] for fact in facts if fact["found"] not in ("same", "take")} == used
    card = (tmp_path / "tiny" / "report" / "README.md").read_text()
    assert "the scales of the experts that stay" in card
    assert names(pipeline.run(words(place, *sets), tmp_path), reused=False) == []
    cost = next(one for one in preflight.estimate(words(place, *sets), tmp_path / "dry").stages if one.name == "heal")
    assert cost.memory_bytes > 0
