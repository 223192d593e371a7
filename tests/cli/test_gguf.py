"""`gemcut gguf` as a user meets it: files, tables, refusals, and what a second run finds."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tests.cli.verb import gemcut

from gemcut.checkpoint import open_checkpoint
from gemcut.export import imatrix as importance
from gemcut.export.layout import layout_of
from gemcut.gguf_file import open_gguf, read_gguf
from gemcut.records import save_plan
from gemcut.types import LayerPlan, Plan
from gguf_file.raw_gguf import Raw
from tiny import add_vision, make_drafter, make_tiny

DEMO_DENSE = Path(__file__).parents[2] / "demo" / "dense"


def test_many_types_from_one_read_and_nothing_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("gguf", "demo:moe", "-t", "q4_0", "-t", "Q8_0", "-o", tmp_path, "--threads", "2", "--json")
    code, out, _ = gemcut(capsys, *args)
    assert code == 0
    files = json.loads(out)["reports"][0]["files"]
    assert [file["name"] for file in files] == ["demo-moe-Q4_0.gguf", "demo-moe-Q8_0.gguf"]
    for file in files:
        theirs = GGUFReader(tmp_path / file["name"])
        assert len(theirs.tensors) == file["quantised"] == 134
        assert (tmp_path / file["name"]).stat().st_size == file["size_bytes"]
    found = read_gguf(tmp_path / "demo-moe-Q8_0.gguf")
    assert found.value("general.file_type") == 7
    assert found.value("gemcut.parent.fingerprint")
    assert found.value("general.name") == "Demo Moe"
    code, out, _ = gemcut(capsys, *args)
    assert [file["found"] for file in json.loads(out)["reports"][0]["files"]] == [True, True]


def test_a_dry_run_says_the_size_to_the_byte_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_folder = tmp_path / "o"
    args = ("gguf", "demo:dense", "-t", "Q8_0", "--tensor-type", "attn_k=f16", "-o", out_folder)
    code, out, _ = gemcut(capsys, *args, "--dry-run", "--json")
    assert code == 0
    assert not out_folder.exists()
    said = json.loads(out)
    assert gemcut(capsys, *args)[0] == 0
    file = read_gguf(out_folder / "demo-dense-Q8_0.gguf")
    assert said["files"][0]["size_bytes"] == file.size_bytes == said["write_bytes"]
    assert {"F16"} == {kind for one in said["files"][0]["kinds"] if one["role"] == "attn_k" for kind in one["types"]}
    assert {r.kind.name for r in file.tensors.values() if "attn_k.weight" in r.name} == {"F16"}
    for more, bytes_ in ((), 0), (("--force",), file.size_bytes):
        assert json.loads(gemcut(capsys, *args, *more, "--dry-run", "--json")[1])["write_bytes"] == bytes_
    other = ("gguf", "demo:dense", "-t", "Q8_0", "-o", out_folder)
    code, _, err = gemcut(capsys, *other, "--dry-run")
    assert (code, "exists already" in err) == (2, True)
    assert gemcut(capsys, *other, "--dry-run", "--force")[0] == 0
    code, out, _ = gemcut(capsys, *args, "--dry-run")
    assert f"{file.size_bytes:,}" in out
    assert "free" in out


def test_types_of_tensors_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "types.txt"
    lines.write_text("# keys in full\nattn_k=f16\n\nattn_v=q5_0  # and values less so\n")
    args = (
        "gguf",
        "demo:dense",
        "-t",
        "Q8_0",
        "--tensor-type-file",
        lines,
        "-o",
        tmp_path / "o",
        "--dry-run",
        "--json",
    )
    for more, keys in ((), ["F16"]), (("--tensor-type", "attn_k=q4_0"), ["Q4_0"]):
        if more:  # over every line that it leaves nothing to
            lines.write_text("attn_v=q5_0\n")
        code, out, err = gemcut(capsys, *args, *more)
        assert code == 0, err
        types = {one["role"]: one["types"] for one in json.loads(out)["files"][0]["kinds"]}
        assert (types["attn_k"], types["attn_v"]) == (keys, ["Q5_0"])
    lines.write_text("attn_v=q5_0\nattn_k\n")
    code, _, err = gemcut(capsys, *args)
    assert (code, "types.txt, line 2" in err) == (2, True)


def test_a_plan_on_the_way_with_heads_of_its_own_in_every_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = open_checkpoint(DEMO_DENSE)
    layers = {1: LayerPlan((0, 2, 4, 6), dict.fromkeys((1, 3, 5, 7), "test")),
              5: LayerPlan((4, 5, 6, 7), dict.fromkeys(range(4), "test"))}  # fmt: skip
    plan = Plan("heads", base.fingerprint, 8, layers, params={"mode": "structural"})
    save_plan(plan, tmp_path / "plan.json")
    args = ("demo:dense", "--plan", tmp_path / "plan.json")
    code, _, err = gemcut(capsys, "cut", *args, "-o", tmp_path / "cut")
    assert code == 2
    assert "gemcut gguf --plan" in err
    code, _, _ = gemcut(capsys, "gguf", *args, "-t", "Q8_0", "-o", tmp_path / "o")
    assert code == 0
    found = read_gguf(tmp_path / "o" / "demo-dense-cut-Q8_0.gguf")
    assert found.value("gemma4.attention.head_count") == (8, 4, 8, 8, 8, 4, 8, 8, 8, 8, 8, 8)
    assert found.value("gemma4.attention.head_count_kv") == (4, 4, 4, 4, 4, 1, 4, 4, 4, 4, 4, 2)
    assert found.value("gemcut.parent.fingerprint") == base.fingerprint
    assert found.ref("blk.1.attn_q.weight").shape == (128, 256)
    code, _, err = gemcut(capsys, "gguf", "demo:dense", "-t", "Q8_0", "--heal", tmp_path, "-o", tmp_path / "o")
    assert code == 2
    assert "--plan" in err


def test_a_drafter_is_exported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_drafter(tmp_path / "little-drafter")
    code, _, err = gemcut(capsys, "gguf", folder, "-t", "BF16", "-o", tmp_path / "o")
    assert code == 0, err
    assert read_gguf(tmp_path / "o" / "little-drafter-BF16.gguf").value("general.architecture") == "gemma4-assistant"


def test_a_model_with_its_tower_and_its_drafter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, drafter = add_vision(make_tiny(tmp_path / "eyes", "moe")), make_drafter(tmp_path / "little")
    words = ("-t", "Q8_0", "--mmproj", "f16", "--mmproj", "Q8_0", "--drafter", drafter, "-o", tmp_path / "o")
    code, _, err = gemcut(capsys, "gguf", model, *words)
    assert code == 0, err
    found = {path.name: read_gguf(path) for path in (tmp_path / "o").glob("*.gguf")}
    assert {
        name: (file.value("general.architecture"), file.value("general.file_type")) for name, file in found.items()
    } == {
        "eyes-Q8_0.gguf": ("gemma4", 7),
        "mmproj-eyes-F16.gguf": ("clip", 1),
        "mmproj-eyes-Q8_0.gguf": ("clip", 7),
        "little-Q8_0.gguf": ("gemma4-assistant", 7),
    }
    wide = make_drafter(tmp_path / "wide", backbone=96)
    twin = make_drafter(tmp_path / "twin" / "eyes")
    for other, says in (
        (model, "no drafter"),
        (wide, "made for another model"),
        (twin, "two files would have one name"),
    ):
        code, _, err = gemcut(capsys, "gguf", model, "-t", "Q8_0", "--drafter", other, "-o", tmp_path / "n")
        assert (code, says in err) == (2, True), err
    assert not (tmp_path / "n").exists()


def test_a_tower_alone_says_how_to_join_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gemcut(capsys, "gguf", DEMO_DENSE.parent / "moe-vision", "--mmproj", "F16", "-o", tmp_path / "o")
    assert code == 4
    assert "a vision tower without its trunk" in err
    assert "demo.train.join" in err
    assert not (tmp_path / "o").exists()


def test_parts_of_at_most_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gemcut(capsys, "gguf", "demo:moe", "-t", "Q8_0", "-o", tmp_path, "--max-shard-size", "4MB")[0] == 0
    parts = sorted(tmp_path.glob("*.gguf"))
    for words in (("gguf", parts[0], "-t", "Q4_0", "-o", tmp_path / "o"), ("inspect", parts[0])):
        code, _, err = gemcut(capsys, *words)
        assert (code, "this is a GGUF file" in err) == (2, True)
    assert len(parts) == 4
    assert all(part.stat().st_size < 4_300_000 for part in parts)
    assert len(open_gguf(parts[2]).tensors) == 134


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((), 2, "no file type"),
        (("-t", "Q9_K"), 2, "no such file type"),
        (("-t", ""), 2, "got an empty name, wanted Q4_K_M"),
        (("-t", "IQ2_M"), 2, "needs an importance matrix"),
        (("-t", "Q8_0", "--tensor-type", "nothing=q4_k"), 2, "binds nothing"),
        (("-t", "Q8_0", "--tensor-type", "attn_k=IQ3_M"), 2, "mix of types"),
        (("-t", "Q8_0", "--max-shard-size", "many"), 2, "not a size"),
        (("-t", "Q8_0", "--mmproj", "F16"), 2, "no vision tower"),
        (("-t", "Q8_0", "--imatrix", "no/such.gguf"), 2, "no such imatrix"),
        (("-t", "Q8_0", "--kv", "q8_0"), 2, "--kv would change nothing here"),
        (("-t", "Q8_0", "--with", "mmproj"), 2, "wanted --fit"),
        (("-t", "Q8_0", "--curvature", "c"), 2, "--curvature would change nothing here"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, says: str
) -> None:
    found, _, err = gemcut(capsys, "gguf", "demo:dense", "-o", tmp_path / "o", *args)
    assert found == code
    assert says in err
    assert not (tmp_path / "o").exists()


def test_a_dry_run_of_one_file_has_one_row_for_what_stays_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("gguf", "demo:dense", "-t", "Q4_K_M", "--dry-run", "-o", tmp_path / "o")
    _, out, _ = gemcut(capsys, *words)
    assert "9 kinds of norms, scales" in out
    assert "attn_norm" not in out
    _, out, _ = gemcut(capsys, *words, "-v")
    assert "attn_norm" in out
    _, out, _ = gemcut(capsys, "gguf", "demo:dense", "-t", "F32", "--dry-run", "-o", tmp_path / "o")
    assert "attn_norm" in out


def write_imatrix(path: Path, columns: int = 256, name: str = "blk.0.attn_q.weight") -> None:
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["/somebody/calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor(f"{name}.in_sum2", np.linspace(1, 9, columns, dtype=np.float32)[None])
    writer.add_tensor(f"{name}.counts", np.full((1, 1), 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_imatrix_is_used_and_named_without_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = tmp_path / "deep" / "calibration.gguf"
    matrix.parent.mkdir()
    write_imatrix(matrix)
    for where, more in (("plain", ()), ("weighed", ("--imatrix", matrix))):
        assert gemcut(capsys, "gguf", "demo:dense", "-t", "Q4_K_S", "-o", tmp_path / where, *more)[0] == 0
    plain, weighed = (read_gguf(tmp_path / w / "demo-dense-Q4_K_S.gguf") for w in ("plain", "weighed"))
    differ = [name for name in plain.tensors if plain.read(name).tobytes() != weighed.read(name).tobytes()]
    assert differ == ["blk.0.attn_q.weight"]
    assert weighed.value("quantize.imatrix.file") == "calibration.gguf"
    assert weighed.value("quantize.imatrix.dataset") == "calibration.txt"
    assert weighed.value("quantize.imatrix.entries_count") == 1
    assert weighed.value("quantize.imatrix.chunks_count") == 3
    assert str(tmp_path).encode() not in (tmp_path / "weighed" / "demo-dense-Q4_K_S.gguf").read_bytes()


@pytest.mark.parametrize(("columns", "name"), [(128, "blk.0.attn_q.weight"), (256, "blk.99.attn_q.weight")])
def test_an_imatrix_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: int, name: str
) -> None:
    write_imatrix(tmp_path / "i.gguf", columns, name)
    code, _, err = gemcut(
        capsys, "gguf", "demo:dense", "-t", "Q4_K_S", "-o", tmp_path / "o", "--imatrix", tmp_path / "i.gguf"
    )
    assert code == 4
    assert "another model" in err


def broken(path: Path, how: str) -> Path:
    write_imatrix(path)
    raw = bytearray(path.read_bytes())
    file = read_gguf(path)
    if how == "cut off":
        raw = raw[: len(raw) // 2]
    if how == "killed":
        raw[:32] = bytes(32)
    if how == "NaN":
        start = file.tensors["blk.0.attn_q.weight.in_sum2"].start
        raw[start : start + 4] = np.float32("nan").tobytes()
    if how == "a model":
        gguf_of_a_model = next(path.parent.glob("*.gguf.model"))
        raw = bytearray(gguf_of_a_model.read_bytes())
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut off", "file ends|outside the file"),
        ("killed", "never finished"),
        ("NaN", "NaN"),
        ("a model", "no imatrix"),
    ],
)
def test_a_broken_imatrix(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, says: str) -> None:
    (tmp_path / "other.gguf.model").write_bytes(Raw().build())
    matrix = broken(tmp_path / "i.gguf", how)
    code, _, err = gemcut(capsys, "gguf", "demo:dense", "-t", "Q4_K_S", "-o", tmp_path / "o", "--imatrix", matrix)
    assert code == 4
    assert re.search(says, err), err
    assert not (tmp_path / "o").exists()


def test_an_imatrix_that_lacks_what_the_type_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_imatrix(tmp_path / "i.gguf")
    args = ("gguf", "demo:dense", "-t", "IQ2_M", "-o", tmp_path / "o", "--imatrix", tmp_path / "i.gguf")
    code, _, err = gemcut(capsys, *args)
    assert code == 2
    assert "lacks tensors" in err


def whole_imatrix(path: Path, model: Path, counts: Mapping[str, int | range], fingerprint: str = "") -> Path:
    """Of every tensor of a model.   counts: of those whose name ends so: rows, or the experts that saw none."""
    made = importance.presumed(layout_of(open_checkpoint(model)))
    entries = dict(made.entries)
    for name, entry in made.entries.items():
        for end, seen in counts.items():
            if name.endswith(end):
                rows = np.full(len(entry.counts), 100 if isinstance(seen, range) else seen, np.int64)
                rows[list(seen) if isinstance(seen, range) else []] = 0
                entries[name] = importance.Entry(entry.sums * (rows > 0)[:, None].astype(np.float32), rows)
    importance.write_imatrix(path, replace(made, entries=entries, model_fingerprint=fingerprint))
    return path


def test_an_imatrix_that_saw_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = whole_imatrix(tmp_path / "blind.gguf", DEMO_DENSE, {".weight": 0})
    args = ("gguf", "demo:dense", "-o", tmp_path / "o", "--dry-run")
    code, _, err = gemcut(capsys, *args, "-t", "IQ2_M", "--imatrix", blind)
    assert code == 2
    assert "has seen nothing of tensors that need it" in err
    assert "blk.0." in err
    assert "with all counts 0" in err
    assert "make one from more text" in err
    code, _, err = gemcut(capsys, *args, "-t", "Q4_K_M", "--imatrix", blind)
    assert (code, "no text has reached blk.0." in err) == (0, True), err
    partly = whole_imatrix(tmp_path / "partly.gguf", DEMO_DENSE, {"blk.3.ffn_down.weight": 0})
    code, _, err = gemcut(capsys, *args, "-t", "IQ2_XXS", "--imatrix", partly)
    assert code == 2
    assert "blk.3.ffn_down.weight" in err
    assert "more" not in err.split("blk.3.ffn_down.weight")[1].splitlines()[0]
    seen = whole_imatrix(tmp_path / "seen.gguf", DEMO_DENSE, {})
    code, _, err = gemcut(capsys, *args, "-t", "IQ2_M", "--imatrix", seen)
    assert (code, "reached" in err) == (0, False), err


def test_an_imatrix_that_passed_no_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("gguf", "demo:moe", "-t", "Q4_K_M", "-o", tmp_path / "o", "--dry-run", "--imatrix")
    name = "blk.2.ffn_down_exps.weight"
    starved = whole_imatrix(tmp_path / "starved.gguf", DEMO_DENSE.parent / "moe", {name: range(7)})
    code, _, err = gemcut(capsys, *args, starved)
    assert code == 0
    assert f"starves experts of 1 tensors, most in {name}: 7 of 32 saw less" in " ".join(err.split())
    assert "7 saw none" in " ".join(err.split())
    passing = whole_imatrix(tmp_path / "passing.gguf", DEMO_DENSE.parent / "moe", {name: range(6)})
    code, _, err = gemcut(capsys, *args, passing)
    assert (code, "starves" in err) == (0, False), err


def test_an_imatrix_of_other_weights_in_the_same_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("gguf", "demo:dense", "-t", "IQ2_M", "-o", tmp_path / "o", "--dry-run", "--imatrix")
    own = open_checkpoint(DEMO_DENSE).fingerprint
    for model, warned in ("f" * 64, True), (own, False), ("", False):
        file = whole_imatrix(tmp_path / f"of-{model[:1]}.gguf", DEMO_DENSE, {}, model)
        code, _, err = gemcut(capsys, *args, file)
        said = " ".join(err.split())
        assert code == 0
        assert ("was made from another checkpoint of the same shapes" in said) == warned
        assert ("gemcut imatrix demo:dense --corpus TEXT" in said) == warned


def test_a_vocabulary_without_the_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny(tmp_path / "tiny", "dense")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("<bos>")
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<bos>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = gemcut(capsys, "gguf", folder, "-t", "Q8_0", "-o", tmp_path / "o")
    assert code == 4
    assert "special token" in err
    assert not (tmp_path / "o").exists()


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        code, _, err = gemcut(capsys, "gguf", "demo:dense", "-t", "Q8_0", "-o", tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 3
    assert "disk is full" in err
    assert not list((tmp_path / "o").glob("*.gguf"))
    assert gemcut(capsys, "gguf", "demo:dense", "-t", "Q8_0", "-o", tmp_path / "o")[0] == 0


def test_the_output_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o").write_text("mine")
    code, _, err = gemcut(capsys, "gguf", "demo:dense", "-t", "Q8_0", "-o", tmp_path / "o")
    assert code == 2
    assert "not a folder" in err
    assert (tmp_path / "o").read_text() == "mine"


def test_an_nvfp4_folder_has_one_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "tiny")
    code, _, err = gemcut(capsys, "gguf", base, "-t", "nvfp4", "-o", tmp_path / "o")
    assert code == 2
    assert "gemcut nvfp4 MODEL" in err
    assert gemcut(capsys, "nvfp4", base, "-o", tmp_path / "four")[0] == 0
    args = ("gguf", tmp_path / "four", "-t", "nvfp4", "-o", tmp_path / "o")
    code, out, _ = gemcut(capsys, *args, "--dry-run", "--json")
    assert code == 0
    assert not (tmp_path / "o").exists()
    code, _, err = gemcut(capsys, *args)
    assert code == 0
    assert "become BF16, without rounding" in err
    file = read_gguf(tmp_path / "o" / "four-NVFP4.gguf")
    assert file.size_bytes == json.loads(out)["files"][0]["size_bytes"]
    assert file.tensors["blk.0.ffn_gate_exps.weight"].kind.name == "NVFP4"
    for words in (("-t", "Q4_K_M"), ("--size", "1MiB"), ("-t", "NVFP4", "--pad-experts")):
        code, _, err = gemcut(capsys, "gguf", tmp_path / "four", *words, "-o", tmp_path / "no")
        assert code == 2
        assert "an NVFP4 checkpoint is stored as" in err
    assert not (tmp_path / "no").exists()
