"""Every kind of bad input, as a user meets it: exit code, one short message, nothing written, inputs untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.verb import gemcut

from tiny import make_tiny

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "base"
    make_tiny(folder, "moe")
    return folder


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "base")
    return tmp_path / "base"


def shard(base: Path, number: int = 1) -> Path:
    return base / f"model-0000{number}-of-00003.safetensors"


@pytest.mark.parametrize("verb", ["gguf", "cut"])
def test_a_name_that_no_file_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    more = ("-t", "Q8_0") if verb == "gguf" else ("--plan", tmp_path / "plan.json")
    for out in (tmp_path / ("o" * 256), tmp_path / ("ü" * 128) / "o"):
        for dry in ((), ("--dry-run",)):
            code, _, err = gemcut(capsys, verb, "demo:moe", *more, "-o", out, *dry)
            assert (code, "a name in -o is too long" in err) == (2, True)


def test_a_model_whose_files_would_have_too_long_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny(tmp_path / ("m" * 240), "dense-text")
    code, _, err = gemcut(capsys, "gguf", model, "-t", "Q8_0", "-o", tmp_path / "o")
    assert (code, "name is too long" in err) == (2, True)
    assert not (tmp_path / "o").exists()


def truncate(base: Path) -> None:
    raw = shard(base).read_bytes()
    shard(base).write_bytes(raw[: len(raw) // 2])


def lie_about_offsets(base: Path) -> None:
    raw = shard(base).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"] = [0, 2**62]
    text = json.dumps(header).encode()
    shard(base).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def lose_a_shard(base: Path) -> None:
    shard(base, 2).unlink()


def index_names_a_ghost(base: Path) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = shard(base).name
    path.write_text(json.dumps(index))


def config_disagrees(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["num_experts"] = 9
    (base / "config.json").write_text(json.dumps(config))


def pickled(base: Path) -> None:
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def another_architecture(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (base / "config.json").write_text(json.dumps(config))


def not_json(base: Path) -> None:
    (base / "config.json").write_bytes(b"\xff\xfe{")


DAMAGES: list[tuple[Damage, int, str]] = [
    (truncate, 4, "model-00001-of-00003.safetensors"),
    (lie_about_offsets, 4, "model-00001-of-00003.safetensors"),
    (lose_a_shard, 4, "model-00002-of-00003.safetensors"),
    (index_names_a_ghost, 4, "model.ghost"),
    (config_disagrees, 4, "9"),
    (pickled, 4, "safetensors"),
    (another_architecture, 2, "gemma4"),
    (not_json, 4, "config.json"),
]


@pytest.mark.parametrize(("damage", "code", "says"), DAMAGES, ids=lambda v: getattr(v, "__name__", None))
@pytest.mark.parametrize("verb", ["inspect", "cut", "observe", "kld", "canary"])
def test_damaged_checkpoints(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, damage: Damage, code: int, says: str
) -> None:
    damage(base)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "c.jsonl").write_text('{"id": "a", "class": "x", "text": "hello there"}\n')
    out = tmp_path / "out"
    args = {
        "inspect": (base,),
        "cut": (base, "--plan", tmp_path / "plan.json", "-o", out),
        "observe": (base, "--corpus", tmp_path / "c.jsonl", "-o", out),
        "kld": (base, base, "--corpus", tmp_path / "c.jsonl", "-o", out),
        "canary": (base, base, "-o", out),
    }[verb]
    got, _, shown = gemcut(capsys, verb, *args)
    assert got == code, shown
    assert says in shown
    assert len(shown.strip().splitlines()) <= 4, shown
    assert not list(tmp_path.glob("out*"))
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("\n\n  \n", "blank"),
        ('{"id": "a", "class": "x"}\n', "line 1"),
        ('{"id": "a", "class": "x", "text": "b", "weight": -1}\n', "weight"),
        ("not json\n", "line 1"),
    ],
)
def test_bad_corpora(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    got, _, shown = gemcut(capsys, "observe", base, "--corpus", tmp_path / "c.jsonl", "-o", tmp_path / "out")
    assert got == 2, shown
    assert says in shown
    assert not list(tmp_path.glob("out*"))


def test_corpus_in_another_encoding(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.jsonl").write_bytes('{"id": "a", "class": "x", "text": "café"}\n'.encode("latin-1"))
    got, _, shown = gemcut(capsys, "observe", base, "--corpus", tmp_path / "c.jsonl", "-o", tmp_path / "out")
    assert got == 2, shown
    assert "UTF-8" in shown


def test_plan_for_another_checkpoint(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {str(i): {"keep": [0, 1, 2, 3]} for i in range(6)}
    plan = {"schema": 1, "kind": "experts", "model": "0" * 64, "units": 8, "criterion": "hand", "layers": layers}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    got, _, shown = gemcut(capsys, "cut", base, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert got == 4, shown
    assert "another checkpoint" in shown
    assert not list(tmp_path.glob("out*"))


def test_existing_output_is_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "class": "x", "text": "hello there"}\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    got, _, shown = gemcut(capsys, "observe", base, "--corpus", tmp_path / "c.jsonl", "-o", tmp_path / "out")
    assert got == 2, shown
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
