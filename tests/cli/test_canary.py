"""`gemcut canary`, as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.verb import gemcut

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.write import write_checkpoint
from gemcut.records.canary import load_canary
from gemcut.types import Mask
from tiny import make_tiny

DEMO = Path(__file__).parents[2] / "demo" / "dense"


@pytest.mark.slow
def test_a_collapsed_candidate_exits_5_and_the_record_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = open_checkpoint(DEMO)
    names = [name for name in base.tensors if name.endswith("self_attn.o_proj.weight")]
    write_checkpoint(
        base, {name: Mask(1, tuple(range(base.ref(name).shape[1]))) for name in names}, base.config, tmp_path / "cut"
    )
    kept = tmp_path / "answers.json"
    arguments = ("canary", DEMO, tmp_path / "cut", "--max-new-tokens", 16, "--base-answers", kept)
    code, out, err = gemcut(capsys, *arguments, "-o", tmp_path / "record")
    assert code == 5, err
    assert "fails the canary under" in err
    assert len(err.strip().splitlines()) <= 4
    assert "thinking, no BOS" in out
    assert "Where they differ most" in out
    record = load_canary(tmp_path / "record" / "canary.json")
    assert not record.passed
    assert record.candidate == "cut"

    code, out, err = gemcut(capsys, *arguments, "--json")
    assert code == 5, err
    found = json.loads(out)
    assert found["passed"] is False
    assert len(found["answers"]) == 144
    assert found["answers"][0]["base_text"]

    code, out, err = gemcut(capsys, "canary", DEMO, DEMO, *arguments[3:])
    assert code == 0, err
    assert "passed" in out
    assert "Where they differ most" not in out


def test_bad_input_is_one_short_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "dense", max_position_embeddings=2048)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = len(tokenizer["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "half.json").write_text('{"schema": 1, "finger')
    out = tmp_path / "out"
    for arguments, code, says in (
        ((base, other), 4, "another tokenizer"),
        ((base, tmp_path / "nowhere"), 2, "nowhere"),
        ((base, base, "--base-answers", tmp_path / "half.json"), 4, "half.json"),
        ((base, base, "--max-memory", "0.001"), 3, "whole model in memory"),
        ((base, base, "--max-new-tokens", "1"), 2, "max-new-tokens"),
    ):
        got, shown, err = gemcut(capsys, "canary", *arguments, "-o", out)
        assert got == code, err
        assert says in err
        assert shown == ""
        assert not out.exists()
    assert (tmp_path / "half.json").read_text() == '{"schema": 1, "finger'
