"""`gemcut nvfp4` as a user meets it: sizes before, a folder, its verification, the other layout, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.verb import gemcut

from gemcut.checkpoint import open_checkpoint
from observed import EVEN, statistics
from tiny import add_vision, make_tiny, write_corpus


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_vision(make_tiny(tmp_path_factory.mktemp("tiny") / "moe"))


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory, moe: Path) -> Path:
    tokens = EVEN.copy()
    tokens[2] = 0
    return statistics(tmp_path_factory.mktemp("observed") / "s", open_checkpoint(moe), tokens)


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_sizes_before_and_the_same_after(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("nvfp4", moe, "--targets", "all", "-o", tmp_path / "out")
    code, out, _ = gemcut(capsys, *args, "--dry-run", "--json")
    assert code == 0
    said = json.loads(out)
    assert not (tmp_path / "out").exists()
    assert {part["part"] for part in said["parts"]} == {"mlp", "experts", "attention"}
    code, out, _ = gemcut(capsys, *args, "--json")
    assert code == 0
    assert json.loads(out)["size_bytes"] == said["size_bytes"] == weights(tmp_path / "out")
    assert json.loads(out)["scales"] == "sweep"
    code, out, _ = gemcut(capsys, *args[:-1], tmp_path / "other", "--dry-run")
    assert "bits per weight" in out
    assert "nothing was written" in out


def test_verify_and_the_other_layout(
    moe: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, _, err = gemcut(capsys, "nvfp4", moe, "--scheme", "nvfp4", "--stats", stats, "--kv", "bound", "-o", out)
    assert code == 0
    assert "borrow from their peers" in err
    code, said, _ = gemcut(capsys, "verify", out, "--base", moe)
    assert code == 0
    assert "finite, plausible, shared where servers fuse" in said
    assert "FP8 cache" in said
    other = tmp_path / "modelopt"
    assert gemcut(capsys, "nvfp4", out, "--convert", "--layout", "modelopt", "-o", other, "--dry-run")[0] == 0
    assert not other.exists()
    assert gemcut(capsys, "nvfp4", out, "--convert", "--layout", "modelopt", "-o", other)[0] == 0
    code, said, _ = gemcut(capsys, "verify", other, "--base", moe, "--json")
    assert code == 0
    assert json.loads(said)["layout"] == "modelopt"
    victim = next(out.glob("*.safetensors"))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.unlink()
    victim.write_bytes(raw)
    code, _, err = gemcut(capsys, "verify", out, "--base", moe)
    assert code == 4


def test_what_stays_is_said(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("nvfp4", moe, "--targets", "mlp", "--ignore", r"layers\.0\.", "-o", tmp_path / "out")
    code, _, err = gemcut(capsys, *args)
    assert code == 0
    assert r"3 linears stay as they are, model.language_model.layers.0.mlp.gate_proj first: matches layers\.0\." in err


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("--scheme", "NVFP4"), 2, "only statistics can tell"),
        (("--scales", "weighted"), 2, "only statistics can tell"),
        (("--ignore", "no_such_module"), 2, "matches nothing"),
        (("--ignore", "gate_proj"), 2, "servers fuse"),
        (("--ignore", "."), 2, "nothing is left"),
        (("--device", "cuda:9"), 3, "torch cannot use this device"),
        (("--convert",), 4, "does not speak of NVFP4"),
        (("--convert", "--scheme", "NVFP4"), 2, "would change nothing here"),
        (("--scheme", "int4"), 2, "Invalid value"),
    ],
)
def test_refusals(
    moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, what: str
) -> None:
    found, _, err = gemcut(capsys, "nvfp4", moe, *words, "-o", tmp_path / "out")
    assert found == code
    assert what in err
    assert not list(tmp_path.iterdir())


def test_folders_that_are_there_or_quantised(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert gemcut(capsys, "nvfp4", moe, "-o", out)[0] == 0
    code, _, err = gemcut(capsys, "nvfp4", moe, "-o", out)
    assert code == 2
    assert "exists already" in err
    assert gemcut(capsys, "nvfp4", moe, "--targets", "mlp", "-o", out, "--force")[0] == 0
    code, _, err = gemcut(capsys, "nvfp4", out, "-o", tmp_path / "twice")
    assert code == 2
    assert "quantised already" in err
    code, _, err = gemcut(capsys, "nvfp4", moe, "-o", moe / "inside")
    assert code == 2
    assert "one lies in the other" in err


def test_statistics_that_cannot_serve(
    moe: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--scheme", "NVFP4", "--stats", stats)
    code, _, err = gemcut(capsys, "nvfp4", moe, *words, "--max-borrowed", "0.05", "-o", tmp_path / "out")
    assert code == 5
    assert "1 of 8" in err
    other = make_tiny(tmp_path / "other", seed=7)
    code, _, err = gemcut(capsys, "nvfp4", other, *words, "-o", tmp_path / "out")
    assert code == 4
    assert "another checkpoint" in err
    assert not (tmp_path / "out").exists()


def test_from_text_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, corpus = make_tiny(tmp_path / "moe"), write_corpus(tmp_path / "corpus.jsonl", 0)
    assert gemcut(capsys, "observe", model, "--corpus", corpus, "-o", tmp_path / "stats")[0] == 0
    words = ("--scheme", "NVFP4", "--targets", "all", "--stats", tmp_path / "stats", "--max-borrowed", "0.5")
    code, out, _ = gemcut(capsys, "nvfp4", model, *words, "-o", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["scales"] == "weighted"
    assert gemcut(capsys, "verify", tmp_path / "out", "--base", model)[0] == 0


def test_measured_and_refused_elsewhere(
    moe: Path, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KLD of a folder in either layout; everything that would learn from its weights or activations says no."""
    out, other, corpus = tmp_path / "out", tmp_path / "other", write_corpus(tmp_path / "c.jsonl", 0)
    words = ("--scheme", "nvfp4", "--targets", "all", "--stats", stats, "--kv", "one")
    assert gemcut(capsys, "nvfp4", moe, *words, "-o", out)[0] == 0
    assert gemcut(capsys, "nvfp4", out, "--convert", "--layout", "modelopt", "-o", other)[0] == 0
    code, said, err = gemcut(capsys, "kld", moe, out, other, "--corpus", corpus, "--json")
    assert code == 0
    assert "heterogeneous" not in err  # what transformers says of a key that is for other loaders
    first, second = json.loads(said)["results"]
    assert first["rows"] == second["rows"]
    assert first["rows"][-1]["mean"]["value"] > 0
    for verb in (
        ("observe", out, "--corpus", corpus, "-o", tmp_path / "s"),
        ("curvature", out, "--corpus", corpus, "-o", tmp_path / "k"),
        ("ablate", out, "--method", "taylor", "--corpus", corpus, "-o", tmp_path / "t"),
    ):
        code, _, err = gemcut(capsys, *verb)
        assert code == 2, verb
        assert err.count("error: an NVFP4 checkpoint can be measured, and nothing be learned from it") == 1
    assert not any((tmp_path / name).exists() for name in "skt")
