"""`gemcut kld` on GGUF files, as a user meets it."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from tests.cli.verb import gemcut

LITTLE = ("--corpus", "demo:heldout", "--max-tokens", "1200", "--threads", "1")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gemcut import exporting
    from gemcut.models import open_model

    out = tmp_path_factory.mktemp("gguf")
    exporting.write_export(
        exporting.plan_export(open_model("demo:dense"), exporting.GgufWords(("Q4_0",))), out, threads=1
    )
    return next(out.glob("*.gguf"))


@pytest.mark.slow
def test_a_file_against_its_folder_with_the_floor_of_noise(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = gemcut(capsys, "kld", "demo:dense", file, *LITTLE, "--floor", "-o", tmp_path, "--json")
    assert code == 0
    floor, four = json.loads(out)["results"]
    assert four["candidate"] == file.name
    floor_nats, nats = (one["rows"][-1]["mean"]["value"] for one in (floor, four))
    assert 0 < floor_nats < nats / 100
    assert sorted(p.name for p in tmp_path.iterdir()) == [  # the file for the floor is gone
        f"kld-{file.name}.json",
        "kld-noise-floor--the-base-in-BF16.json",
    ]
    code, out, err = gemcut(capsys, "kld", "demo:dense", file, *LITTLE)
    assert code == 0
    assert "--floor" in err
    assert f"{nats:.4f}"[:5] in out
    lines = {words[0]: line for line in out.splitlines() if (words := line.split())}
    assert {row["mean"]["n"] for row in four["rows"]} > {1}
    for row in four["rows"]:  # one chunk has no interval
        assert ("[" in lines[row["cls"]]) == (row["mean"]["n"] > 1)


@pytest.mark.slow
def test_the_file_of_the_floor_lies_beside_the_candidate_and_leftovers_go(file: Path) -> None:
    from gemcut import comparing

    killed, running, others = (file.parent / f"gemcut-floor-{name}" for name in ("a", "b", "c"))
    for folder in (killed, running, others):
        folder.mkdir()
        (folder / "demo-dense-BF16.gguf").write_bytes(b"large")
    (killed / "lock").touch()
    compared = comparing.open_comparison("demo:dense", (str(file),))
    with open(running / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with comparing.with_floor(compared, file.parent) as found:
            floor = found.candidates[comparing.FLOOR]
            assert floor.path.parent.parent == file.parent
            assert not killed.exists()
        assert not floor.path.exists()
    assert [running.exists(), others.exists()] == [True, True]  # without a lock it is not ours
    for folder in (running, others):
        shutil.rmtree(folder)


@pytest.mark.slow
def test_only_files_need_a_tokenizer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gemcut(capsys, "kld", file, file, *LITTLE)
    assert code == 2
    assert "--tokenizer" in err
    code, out, _ = gemcut(capsys, "kld", file, file, *LITTLE, "--tokenizer", "demo:dense", "--raw", "--json")
    assert code == 0
    row = json.loads(out)["results"][0]["rows"][-1]
    assert (row["cls"], row["mean"]["value"], row["same_top"]["value"]) == ("all", 0.0, 1.0)
    code, _, err = gemcut(capsys, "kld", file, file, *LITTLE, "--tokenizer", "demo:dense", "--floor")
    assert code == 2
    assert "a base that is a folder" in err


def test_files_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gemcut(capsys, "kld", "demo:dense", tmp_path / "absent.gguf", *LITTLE)
    assert code == 2
    assert "absent.gguf" in err
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    code, _, err = gemcut(capsys, "kld", "demo:dense", tmp_path / "broken.gguf", *LITTLE)
    assert code == 4
    assert "broken.gguf" in err
    assert gemcut(capsys, "gguf", "demo:dense-drafter", "-t", "Q8_0", "-o", tmp_path)[0] == 0
    code, _, err = gemcut(capsys, "kld", "demo:dense", tmp_path / "demo-dense-drafter-Q8_0.gguf", *LITTLE)
    assert code == 2
    assert "without its trunk" in err
