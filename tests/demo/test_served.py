"""The demo's drafters and tower as a user serves them: exported by `gemcut gguf`, run by the pinned llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.verb import gemcut

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from demo.train import join, served  # noqa: E402

from gemcut.gguf_file import open_gguf  # noqa: E402

DEMO = ROOT / "demo"
NEAR = 0.05  # nats between two tokens that rounding may swap: one row at a time and four round otherwise


def measured(out: Path, *words: object) -> dict[str, Any]:
    """The record of `demo.train.served`, in a process of its own: llama.cpp ends the one it is in when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "demo.train.served", *map(str, words), "--out", str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(out.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "least"), [("moe", 0.6), ("dense", 0.25)])
def test_drafts_are_accepted_and_change_no_answer(
    model: str, least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two held-out chats of every class that has chats; a random drafter is accepted next to never."""
    words = ("-t", "Q8_0", "--drafter", DEMO / f"{model}-drafter", "-o", tmp_path)
    code, _, err = gemcut(capsys, "gguf", DEMO / model, *words)
    assert code == 0, err
    files = (tmp_path / f"{model}-Q8_0.gguf", tmp_path / f"{model}-drafter-Q8_0.gguf")
    found = measured(
        tmp_path / "out.json", "drafts", *files, "--corpus", DEMO / "corpus" / "heldout.jsonl", "--per-class", 2
    )
    assert found["prompts"] == 10
    assert found["overall"]["drafted"] > 200
    assert found["overall"]["accepted"] > least * found["overall"]["drafted"]
    assert found["equal_to_greedy"] >= 9
    assert found["unlooped"]["answers"] == 10 - found["loops"]
    assert all(one["margin"] < NEAR for one in found["differ"])


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["F16", "Q8_0"])
def test_pictures_never_seen_are_described(projector: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joined = join.joined(DEMO / "moe", DEMO / "moe-vision", tmp_path / "eyes")
    code, _, err = gemcut(capsys, "gguf", joined, "-t", "Q8_0", "--mmproj", projector, "-o", tmp_path)
    assert code == 0, err
    files = (tmp_path / "eyes-Q8_0.gguf", tmp_path / f"mmproj-eyes-{projector}.gguf")
    assert {ref.kind.name for ref in open_gguf(files[1]).tensors.values()} >= {"F32", projector}
    kinds = measured(tmp_path / "out.json", "pictures", *files, "--pictures", 24)["kinds"]
    right = {kind: row["right"] / row["asked"] for kind, row in kinds.items()}
    assert right["colour"] > 0.8  # chance 0.17
    assert right["shape"] > 0.5  # chance 0.25
    assert right["description"] > 0.1  # chance 0.01


def test_where_two_answers_part() -> None:
    plain = served.Reply("a", [5, 6, 7], [1.0, 0.01, 2.0], 0, 0)
    other = served.Reply("b", [5, 9, 7], [0.0, 0.0, 0.0], 3, 1)
    shorter = served.Reply("c", [5, 6], [0.0, 0.0], 3, 1)
    assert served.parted(plain, plain) is None
    assert served.parted(plain, other) == {"place": 1, "margin": 0.01}
    assert served.parted(plain, shorter) == {"place": 2, "margin": float("inf")}


def test_a_png_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    file = served.png(pixels)
    start = file.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(file[start : file.index(b"IEND") - 8]), np.uint8).reshape(3, 16)
    assert (rows[:, 0] == 0).all()
    assert (rows[:, 1:].reshape(3, 5, 3) == pixels).all()


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_drafter_results_are_of_enough_prompts_and_part_at_ties_only(model: str) -> None:
    record = json.loads((DEMO / "results" / f"{model}-drafter-served.json").read_bytes())
    assert record["prompts"] == 40 == record["equal_to_greedy"] + len(record["differ"])
    assert all(one["margin"] < NEAR for one in record["differ"])
    there = json.loads((DEMO / "results" / f"{model}-drafter.json").read_bytes())["drafts"][str(record["drafts"])]
    low, high = there["overall"]["interval"]
    assert low < record["overall"]["rate"] < high
    assert record["loops"] == 40 - record["unlooped"]["answers"] < 8


def test_picture_results_are_those_of_stock_transformers() -> None:
    record = json.loads((DEMO / "results" / "moe-vision-served.json").read_bytes())
    there = json.loads((DEMO / "results" / "moe-vision.json").read_bytes())
    for kind, row in record["kinds"].items():
        low, high = there["kinds"][kind]["interval"]
        assert low < row["right"] / row["asked"] < high, kind
