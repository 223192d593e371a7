"""`cut`, `verify` and `diff` of GGUF files, and importance matrices cut like their model, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.cli.verb import gemcut

from gemcut.checkpoint import open_checkpoint
from gemcut.export.imatrix import Entry, Imatrix, read_imatrix, wants_importance, write_imatrix
from gemcut.export.layout import layout_of
from gemcut.gguf_file import open_gguf
from gemcut.records import save_plan
from gemcut.types import LayerPlan, Plan
from tiny import make_tiny

KEEP = (0, 2, 3, 6, 8)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE with rows of 256, a plan for it, and importances with an expert that saw too little."""
    root = tmp_path_factory.mktemp("place")
    make_tiny(
        root / "moe", "moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2, num_experts=10,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    base = open_checkpoint(root / "moe", "moe")
    one = LayerPlan(KEEP, {unit: "test" for unit in range(10) if unit not in KEEP})
    save_plan(Plan("experts", base.fingerprint, 10, {0: one, 1: one}), root / "plan.json")
    rng, entries = np.random.default_rng(1), {}
    for tensor in layout_of(base).tensors:
        if wants_importance(tensor):
            units = tensor.shape[0] if len(tensor.shape) == 3 else 1
            entries[tensor.name] = Entry(rng.random((units, tensor.shape[-1]), np.float32), np.full(units, 70))
    starved = {"blk.1.ffn_down_exps.weight": (5, 8)}
    write_imatrix(root / "imatrix.gguf", Imatrix(entries, ("text",), 1, 64, prior_tokens=64, starved=starved))
    return root


def test_both_ways_to_a_cut_file_have_one_payload(place: Path, tmp_path: Path, capsys: Capture) -> None:
    plan, imatrix, types = ("--plan", place / "plan.json"), place / "imatrix.gguf", ("-t", "Q4_K_M", "-t", "IQ3_M")
    moe, small = place / "moe", tmp_path / "small"
    assert gemcut(capsys, "gguf", moe, *types, "--imatrix", imatrix, "-o", tmp_path)[0] == 0
    # the folder and its importances, each cut by the same plan
    assert gemcut(capsys, "cut", moe, *plan, "-o", small)[0] == 0
    less = tmp_path / "less.gguf"
    assert gemcut(capsys, "imatrix", imatrix, "--model", moe, *plan, "-o", less)[0] == 0
    assert read_imatrix(less).starved == {"blk.1.ffn_down_exps.weight": (4,)}
    code, _, err = gemcut(capsys, "gguf", small, *types, "--imatrix", imatrix, "-o", tmp_path / "first")
    assert (code, "take the kept experts" in err) == (4, True)
    assert gemcut(capsys, "gguf", small, *types, "--imatrix", less, "-o", tmp_path / "first")[0] == 0
    for kind in types[1::2]:
        source, out = tmp_path / f"moe-{kind}.gguf", tmp_path / f"cut-{kind}.gguf"
        code, said, _ = gemcut(capsys, "cut", source, *plan, "-o", out, "--json")
        assert code == 0
        assert json.loads(said)["size_bytes_after"] == out.stat().st_size
        a, b = open_gguf(out), open_gguf(tmp_path / "first" / f"small-{kind}.gguf")
        assert [*a.tensors] == [*b.tensors]
        for name, ref in a.tensors.items():
            assert (ref.kind, ref.shape) == (b.ref(name).kind, b.ref(name).shape)
            assert a.read(name).tobytes() == b.read(name).tobytes()
        assert str(tmp_path) not in (tmp_path / f"cut-{kind}.gguf.manifest.json").read_text()
    # the other way's file has names of its own
    code, _, err = gemcut(capsys, "verify", b.path, "--base", source, *plan)
    assert code == 4
    assert "metadata is not what the plan makes" in err
    assert "got 'Small', wanted 'Moe'" in err


def test_cut_verify_and_diff(place: Path, tmp_path: Path, capsys: Capture) -> None:
    gemcut(capsys, "gguf", place / "moe", "-t", "Q8_0", "-t", "Q4_0", "-o", tmp_path)
    big, other, out = (tmp_path / name for name in ("moe-Q8_0.gguf", "moe-Q4_0.gguf", "cut.gguf"))
    cut = ("cut", big, "--plan", place / "plan.json", "-o")
    code, said, _ = gemcut(capsys, *cut, out, "--dry-run", "--json")
    assert code == 0
    assert not out.exists()
    assert gemcut(capsys, *cut, out)[0] == 0
    assert json.loads(said)["size_bytes_after"] == out.stat().st_size
    assert json.loads(said)["tensors"] == 8
    code, said, _ = gemcut(capsys, "verify", out, "--base", big, "--plan", place / "plan.json")
    assert code == 0
    assert "8 of " in said
    code, _, _ = gemcut(capsys, "verify", out, "--base", other)
    assert code == 4
    code, said, _ = gemcut(capsys, "diff", big, other, "--json")
    found = {fact["name"]: fact for fact in json.loads(said)["tensors"]}
    assert found["blk.0.attn_q.weight"]["dtype"] == "Q8_0 → Q4_0"
    assert found["blk.0.attn_q.weight"]["found"] == "values"
    assert found["blk.0.attn_norm.weight"]["found"] == "same"
    assert json.loads(said)["config_changes"]["general.file_type"] == [7, 2]
    code, said, _ = gemcut(capsys, "diff", big, out)
    assert code == 0
    assert "take" in said
    assert "gemma4.expert_count" in said


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("cut", "moe-Q8_0.gguf", "--plan", "plan.json", "-o", "folder"), "-o NAME.gguf"),
        (("cut", "moe-Q8_0.gguf", "--plan", "plan.json", "-o", "x.gguf", "--heal", "h"), "--heal goes with"),
        (("cut", "moe-Q8_0.gguf", "--plan", "plan.json", "-o", "x.gguf", "--copy"), "--copy goes with"),
        (("cut", "moe-Q8_0.gguf", "--plan", "plan.json", "-o", "moe-Q8_0.gguf"), "exists already"),
        (("cut", "moe", "--plan", "plan.json", "-o", "x", "--any-parent"), "--any-parent goes with"),
        (("cut", "none.gguf", "--plan", "plan.json", "-o", "x.gguf"), "no such GGUF file"),
        (("cut", "imatrix.gguf", "--plan", "plan.json", "-o", "x.gguf"), "does not say which checkpoint"),
        (("cut", "imatrix.gguf", "--plan", "plan.json", "-o", "x.gguf", "--any-parent"), "no family knows"),
        (("verify", "moe-Q8_0.gguf", "--base", "moe"), "goes with a checkpoint folder"),
        (("verify", "moe-Q8_0.gguf", "--base", "moe-Q8_0.gguf"), "nothing to hold the file against"),
        (("diff", "moe-Q8_0.gguf", "moe"), "no tensor in common"),
        (("imatrix", "imatrix.gguf", "--plan", "plan.json", "-o", "x.gguf"), "model is not named"),
        (("imatrix", "moe", "--plan", "plan.json", "-o", "x.gguf"), "importance matrix that exists"),
    ],
)
def test_what_is_refused(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], error: str
) -> None:
    monkeypatch.chdir(place)
    if not Path("moe-Q8_0.gguf").exists():
        gemcut(capsys, "gguf", "moe", "-t", "Q8_0", "-o", ".")
    before = sorted(Path().iterdir())
    code, _, err = gemcut(capsys, *args)
    assert code in (2, 4)
    assert error in err
    assert sorted(Path().iterdir()) == before
