"""`gemcut curvature`, and `gemcut gguf` for a size, for a card and for a ContribDynamic tier, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.verb import gemcut
from tests.tiny import make_tiny

from gemcut.checkpoint import open_checkpoint
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import read_gguf
from gemcut.mixing import card_words, size_name
from gemcut.vocabulary import size_bytes

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.slow  # every type's quantiser runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with rows of 256, a corpus, its importance matrix and its curvature."""
    root = tmp_path_factory.mktemp("mixes")
    make_tiny(root / "dense", "dense-text", hidden_size=256)
    items = [{"id": f"a{i}", "class": "x", "text": f"{i} words " * (5 + i)} for i in range(6)]
    (root / "a.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    return root


def run(capsys: Capture, *words: object) -> dict[str, object]:
    code, out, err = gemcut(capsys, *words, "--json")
    assert code == 0, err
    return dict(json.loads(out))


def prepared(place: Path, capsys: Capture) -> tuple[Path, Path]:
    if not (place / "curvature").exists():
        found = run(capsys, "curvature", place / "dense", "--corpus", place / "a.jsonl", "-o", place / "curvature")
        assert found["items"] == 6
        words = ("--corpus", place / "a.jsonl", "-o", place / "i.gguf")
        gemcut(capsys, "imatrix", place / "dense", *words, "-q")
    return place / "curvature", place / "i.gguf"


def test_a_size_is_met_from_below_and_said_before(place: Path, tmp_path: Path, capsys: Capture) -> None:
    curvature, imatrix = prepared(place, capsys)
    stock = run(capsys, "gguf", place / "dense", "-t", "Q4_K_M", "--imatrix", imatrix, "-o", tmp_path, "--dry-run")
    size = stock["files"][0]["size_bytes"]  # type: ignore[index]
    words = ("gguf", place / "dense", "--size", size, "--imatrix", imatrix, "--curvature", curvature, "-o", tmp_path)
    found = run(capsys, *words)
    said = run(capsys, *words, "--dry-run")
    assert said["files"][0]["name"] == f"dense-{size}B.gguf"  # type: ignore[index]
    (mix,) = found["mixes"]  # type: ignore[misc]
    name = said["files"][0]["name"]  # type: ignore[index]
    written = read_gguf(tmp_path / name)
    assert written.size_bytes == mix["size_bytes"] == said["files"][0]["size_bytes"]  # type: ignore[index]
    assert 0.98 * size < written.size_bytes <= size  # 0.5 % on real models; one step of this one's embedding is more
    assert "bits per weight" in (tmp_path / name.replace(".gguf", ".bits.svg")).read_text()
    kept = (tmp_path / "damages.json").read_bytes()
    assert json.loads(kept)["settings"]["quantiser"]
    again = run(capsys, *words, "--force")
    assert (tmp_path / "damages.json").read_bytes() == kept
    assert again["mixes"] == found["mixes"]


def test_types_by_hand_stay(place: Path, tmp_path: Path, capsys: Capture) -> None:
    curvature, imatrix = prepared(place, capsys)
    words = ("--imatrix", imatrix, "--curvature", curvature, "--tensor-type", "attn_k=f16", "-o", tmp_path)
    run(capsys, "gguf", place / "dense", "--size", "2MB", *words)
    (path,) = tmp_path.glob("*.gguf")
    kinds = {ref.kind for name, ref in read_gguf(path).tensors.items() if name.endswith("attn_k.weight")}
    assert kinds == {GgmlType.F16}


def test_names_say_what_was_asked_and_a_size_is_asked_once(place: Path, tmp_path: Path, capsys: Capture) -> None:
    curvature, imatrix = prepared(place, capsys)
    words = ("--imatrix", imatrix, "--curvature", curvature, "-o", tmp_path)
    sizes = [word for one in ("900KB", "0.9MB", "900000", "930KB", "1GiB") for word in ("--size", one)]
    said = run(capsys, "gguf", place / "dense", *sizes, *words, "--dry-run")
    names = [file["name"] for file in said["files"]]  # type: ignore[attr-defined]
    assert names == [f"dense-{name}.gguf" for name in ("900KB", "930KB", "1GiB")]
    assert not list(tmp_path.iterdir())
    code, out, err = gemcut(capsys, "gguf", place / "dense", *sizes, *words, "--dry-run")
    assert (code, " ".join(out.split()).count("every tensor has its best type")) == (0, 1)
    assert "is measured now" in err
    run(capsys, "gguf", place / "dense", *sizes, *words)
    kept = (tmp_path / "damages.json").stat().st_mtime_ns
    code, _, err = gemcut(capsys, "gguf", place / "dense", *sizes, *words, "--dry-run")
    assert (code, "is measured now" in err) == (0, False)  # once
    assert (tmp_path / "damages.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("10GiB", "10GiB"),
        ("7.64GiB", "7.64GiB"),
        ("3.5MB", "3.5MB"),
        ("3500KB", "3.5MB"),
        ("24GB", "24GB"),
        ("2049", "2049B"),
    ],
)
def test_the_name_of_a_size_means_that_size(text: str, name: str) -> None:
    assert size_name(size_bytes(text)) == name
    assert size_bytes(name) == size_bytes(text)


def test_a_card_shows_where_its_memory_goes(place: Path, tmp_path: Path, capsys: Capture) -> None:
    curvature, imatrix = prepared(place, capsys)
    beside = place / "a.jsonl"
    words = (
        "gguf", place / "dense", "--fit", "520MiB", "--context", 1024, "--kv", "f16", "--with", beside,
        "--imatrix", imatrix, "--curvature", curvature, "-o", tmp_path,
    )  # fmt: skip
    found = run(capsys, *words)
    (mix,) = found["mixes"]  # type: ignore[misc]
    assert mix["memory"]["a.jsonl"] == beside.stat().st_size
    assert mix["budget_bytes"] + sum(mix["memory"].values()) == 520 << 20
    assert mix["size_bytes"] <= mix["budget_bytes"]
    code, out, _ = gemcut(capsys, *words, "--dry-run")
    assert code == 0
    assert "KV cache, sliding layers" in out


def test_a_split_file_beside_the_model_counts_with_all_its_parts(place: Path, tmp_path: Path, capsys: Capture) -> None:
    run(capsys, "gguf", place / "dense", "-t", "Q8_0", "--max-shard-size", "200KB", "-o", tmp_path)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    card = card_words(open_checkpoint(place / "dense"), 1 << 30, 1024, "f16", [str(parts[1])])
    assert card.others == ((parts[1].name, sum(part.stat().st_size for part in parts)),)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "100KB"), "no mix of these types is so small"),
        (("--fit", "64MiB"), "nothing is left for the weights"),
        (("--fit", "1GiB", "--kv", "q4_k"), "no such type of a KV cache"),
        (("--fit", "1GiB", "--with", "nothing.gguf"), "nothing that could lie beside the model"),
        (("--fit", "1GiB", "--with", "mmproj"), "vision"),
    ],
)
def test_what_cannot_be_is_refused(
    place: Path, tmp_path: Path, capsys: Capture, words: tuple[str, ...], said: str
) -> None:
    curvature, imatrix = prepared(place, capsys)
    code, _, err = gemcut(
        capsys, "gguf", place / "dense", *words, "--imatrix", imatrix, "--curvature", curvature, "-o", tmp_path
    )
    assert code == 2
    assert said in err
    assert not list(tmp_path.glob("*.gguf"))


def test_a_size_needs_a_curvature_and_a_tier_importances(place: Path, tmp_path: Path, capsys: Capture) -> None:
    code, _, err = gemcut(capsys, "gguf", place / "dense", "--size", "2MB", "-o", tmp_path)
    assert (code, "gemcut curvature" in err) == (2, True)
    code, _, err = gemcut(capsys, "gguf", place / "dense", "-t", "CD-Q3_K_M", "-o", tmp_path)
    assert (code, "--imatrix" in err) == (2, True)


def test_a_tier_by_contribution(place: Path, tmp_path: Path, capsys: Capture) -> None:
    _, imatrix = prepared(place, capsys)
    run(capsys, "gguf", place / "dense", "-t", "cd-q4_k_m", "-t", "Q4_K_M", "--imatrix", imatrix, "-o", tmp_path)
    tier, plain = (read_gguf(tmp_path / f"dense-{name}.gguf").tensors for name in ("CD-Q4_K_M", "Q4_K_M"))
    assert {name: ref.kind for name, ref in tier.items()} != {name: ref.kind for name, ref in plain.items()}
    assert tier["token_embd.weight"].kind is GgmlType.Q8_0
