"""The verb, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.verb import gemcut
from tests.tiny import make_tiny

from gemcut.checkpoint.read import open_checkpoint
from gemcut.export.imatrix import read_imatrix
from gemcut.observe.run import observe
from gemcut.stream.corpus import load_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE, two corpora, and the statistics of the first."""
    root = tmp_path_factory.mktemp("verb")
    make_tiny(root / "moe", "moe-text")
    make_tiny(root / "dense", "dense-text")
    for name, seed in (("a", 1), ("b", 2)):
        items = [{"id": f"{name}{i}", "class": "x", "text": f"{seed * i} words " * (5 + i)} for i in range(8)]
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    base = open_checkpoint(root / "moe")
    observe(base, load_corpus(root / "a.jsonl", base.path), root / "stats")
    return root


Capture = pytest.CaptureFixture[str]


def test_statistics_need_no_second_pass(place: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = gemcut(
        capsys, "imatrix", place / "stats", "--model", place / "moe", "-o", tmp_path / "i.gguf", "--json"
    )
    found = json.loads(out)
    assert code in (0, 5)  # eight short items may well starve experts of a random router; the file is there anyhow
    assert found["entries"] == len(read_imatrix(tmp_path / "i.gguf").entries)
    assert json.loads((tmp_path / "i.gguf.json").read_text())["sha256"] == found["sha256"]
    assert str(place) not in (tmp_path / "i.gguf.json").read_text()


def test_a_model_is_observed_first_and_gives_the_same(place: Path, tmp_path: Path, capsys: Capture) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    gemcut(capsys, "imatrix", place / "moe", "--corpus", place / "a.jsonl", "-o", a, "-q")
    gemcut(capsys, "imatrix", f"{a}.statistics", "--model", place / "moe", "-o", b, "-q")
    assert a.read_bytes() == b.read_bytes()


def test_merging_adds_the_tokens(place: Path, tmp_path: Path, capsys: Capture) -> None:
    a, b, both = (tmp_path / f"{name}.gguf" for name in ("a", "b", "ab"))
    for name, path in (("a", a), ("b", b)):
        gemcut(capsys, "imatrix", place / "moe", "--corpus", place / f"{name}.jsonl", "-o", path, "-q")
    gemcut(capsys, "imatrix", a, "--merge", b, "-o", both, "-q")
    counts = [int(read_imatrix(path).entries["blk.2.attn_q.weight"].counts[0]) for path in (a, b, both)]
    assert counts[2] == counts[0] + counts[1]
    code, _, err = gemcut(capsys, "imatrix", a, "--merge", a, "-o", tmp_path / "aa.gguf")
    assert code == 2
    assert "same text" in err


def test_a_starving_corpus_is_exit_code_5_and_the_file_is_kept(place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "a", "class": "x", "text": "a"}))
    words = ("imatrix", place / "moe", "--corpus", tmp_path / "one.jsonl", "-o", tmp_path / "i.gguf")
    code, out, err = gemcut(capsys, *words)
    assert code == 5
    assert "starves" in err
    assert "borrowed 64 rows" in out
    assert read_imatrix(tmp_path / "i.gguf").starved


def test_a_dry_run_writes_nothing(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "i.gguf"
    code, said, _ = gemcut(
        capsys, "imatrix", place / "moe", "--corpus", place / "a.jsonl", "-o", out, "--dry-run", "--json"
    )
    assert code == 0
    assert [stage["name"] for stage in json.loads(said)["stages"]] == ["observe", "imatrix"]
    assert gemcut(capsys, "imatrix", place / "stats", "--model", place / "moe", "-o", out, "--dry-run")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_auto_says_who_won(place: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("imatrix", place / "stats", "--model", place / "moe", "-o", tmp_path / "i.gguf")
    _, out, _ = gemcut(capsys, *words, "--variant", "auto", "--for", "Q4_0", "--json")
    found = json.loads(out)
    assert found["target"] == "Q4_0"
    assert len(found["choices"]) == found["entries"]
    for one in found["choices"]:
        assert one["errors"][one["variant"]] == min(one["errors"].values())
        assert one["errors"]["plain"] == pytest.approx(1.0)
    assert read_imatrix(tmp_path / "i.gguf").variant == "auto"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{moe}",), "--corpus"),
        (("{stats}", "--corpus", "x.jsonl"), "observed already"),
        (("{stats}", "--variant", "best"), "no such variant"),
        (("{stats}", "--variant", "auto"), "--for IQ2_M"),
        (("{stats}", "--for", "IQ2_M"), "belongs to auto"),
        (("{moe}", "--corpus", "{corpus}", "--variant", "auto", "--for", "BAR"), "no such file type"),
        (("{moe}", "--corpus", "{corpus}", "--variant", "auto", "--for", "BAR", "--dry-run"), "no such file type"),
        (("{moe}", "--corpus", "{corpus}", "--merge", "absent.gguf"), "no such imatrix"),
        (("{moe}", "--corpus", "{corpus}", "--merge", "absent.gguf", "--dry-run"), "no such imatrix"),
        (("{moe}", "--corpus", "{corpus}", "--merge", "{rms4}", "--dry-run"), "do not add up"),
        (("{stats}", "--variant", "rms4", "--merge", "x"), "only sums of squares"),
        (("{stats}", "--model", "{moe}", "--merge", "nothing.gguf"), "no such imatrix"),
        (("{stats}", "--model", "{moe}", "--max-tokens", "9"), "--max-tokens would change nothing here"),
        (("{file}", "--roundings", "8"), "--roundings would change nothing here"),
        (("{file}", "--prior", "64"), "wanted statistics, or a model"),
    ],
)
def test_wrong_words(place: Path, tmp_path: Path, words: tuple[str, ...], said: str, capsys: Capture) -> None:
    file = tmp_path / "there.gguf"
    file.touch()
    names = {"moe": place / "moe", "stats": place / "stats", "corpus": place / "a.jsonl", "file": file}
    if "{rms4}" in words:
        names["rms4"] = tmp_path / "rms4.gguf"
        gemcut(
            capsys, "imatrix", place / "stats", "--model", place / "moe", "--variant", "rms4", "-o", names["rms4"], "-q"
        )
    given = [word.format_map(names) for word in words]
    code, _, err = gemcut(capsys, "imatrix", *given, "-o", tmp_path / "i.gguf")
    assert code == 2
    assert said in err
    assert not list(tmp_path.glob("i.gguf*")), "refused before anything is observed"


def test_another_model_is_exit_code_4(place: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("imatrix", place / "stats", "--model", place / "dense", "-o", tmp_path / "i.gguf")
    assert gemcut(capsys, *words)[0] == 4
    assert not (tmp_path / "i.gguf").exists()


def test_an_existing_file_is_kept_without_force(place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "i.gguf").write_text("mine")
    words = ("imatrix", place / "stats", "--model", place / "moe", "-o", tmp_path / "i.gguf")
    assert gemcut(capsys, *words)[0] == 2
    assert (tmp_path / "i.gguf").read_text() == "mine"
    assert gemcut(capsys, *words, "--force")[0] in (0, 5)
