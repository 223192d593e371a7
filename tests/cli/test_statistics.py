"""`gemcut merge`, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.verb import gemcut

from gemcut.cli.main import main
from gemcut.records.statistics import load_statistics_index
from tiny import make_tiny, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of one tiny model on two corpora, and of another model."""
    root = tmp_path_factory.mktemp("merge")
    for name, seed, corpus in (("a", 0, 1), ("b", 0, 2), ("other", 5, 3)):
        base = root / f"base-{seed}"
        if not base.exists():
            make_tiny(base, "moe", seed=seed)
        text = write_corpus(root / f"{name}.jsonl", corpus)
        with pytest.raises(SystemExit):
            main(["observe", str(base), "--corpus", str(text), "-o", str(root / name), "--set", "dtype=float32", "-q"])
    return root


def test_two_observations_are_one_and_can_be_planned_from(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = gemcut(capsys, "merge", place / "a", place / "b", "-o", tmp_path / "both", "--json")
    assert code == 0, err
    found = json.loads(out)
    parts = [load_statistics_index(place / name).meta for name in ("a", "b")]
    assert (found["items"], found["tokens"]) == (24, sum(part.tokens for part in parts))
    plan = ("plan", "experts", tmp_path / "both", "--keep", 5, "--criterion", "reap", "-o", tmp_path / "plan.json")
    assert gemcut(capsys, *plan)[0] == 0
    again = gemcut(capsys, "merge", place / "a", place / "b", "-o", tmp_path / "both")
    assert again[0] == 2
    assert "exists already" in again[2]
    assert gemcut(capsys, "merge", place / "a", place / "b", "-o", tmp_path / "both", "--force", "-q")[0] == 0


@pytest.mark.parametrize(
    ("parts", "code", "says"),
    [
        (("a",), 2, "two observations are needed"),
        (("a", "a"), 2, "are in both observations"),
        (("a", "other"), 2, "different model_fingerprint"),
        (("a", "nowhere"), 2, "nowhere"),
    ],
)
def test_what_does_not_add_up(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], parts: tuple[str, ...], code: int, says: str
) -> None:
    got, _, err = gemcut(capsys, "merge", *(place / part for part in parts), "-o", tmp_path / "out")
    assert got == code, err
    assert says in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4
    assert not (tmp_path / "out").exists()
