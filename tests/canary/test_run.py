"""The canary on trained checkpoints that were damaged for real, and on files that are not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemcut.canary import CANARY, CanarySettings, against, base_of, run_canary
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.checkpoint.write import write_checkpoint
from gemcut.errors import CheckpointError
from gemcut.records.canary import Answers, CanaryResult, load_canary, save_canary
from gemcut.types import Edit, Mask
from tiny import make_tiny

DEMO = Path(__file__).parents[2] / "demo"
SETTINGS = CanarySettings(max_new_tokens=32)
SHORT = CanarySettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return open_checkpoint(DEMO / "dense")


@pytest.fixture(scope="module")
def dense_answers(dense: Checkpoint) -> Answers:
    return base_of(dense, SETTINGS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("canary") / "base", "dense", max_position_embeddings=2048)


def damaged(base: Checkpoint, edits: Mapping[str, Edit], out: Path) -> Checkpoint:
    write_checkpoint(base, edits, base.config, out)
    return open_checkpoint(out)


def failed(result: CanaryResult) -> set[tuple[str, bool]]:
    return {(c.style, c.bos) for c in result.conditions if c.reasons}


@pytest.mark.slow
def test_a_trained_model_against_itself_passes_exactly(dense: Checkpoint, dense_answers: Answers) -> None:
    result = against(dense_answers, dense, SETTINGS)
    assert result.passed
    assert result.base_sound
    assert all(a.divergence is None for a in result.answers)
    assert all(a.new == () for a in result.answers)
    for c in result.conditions:
        assert c.nll_ratio is not None
        assert c.nll_ratio.value == 1.0
        assert c.base_sound


@pytest.mark.slow
def test_attention_without_outputs_collapses_and_fails(
    dense: Checkpoint, dense_answers: Answers, tmp_path: Path
) -> None:
    names = [name for name in dense.tensors if name.endswith("self_attn.o_proj.weight")][2:]
    edits = {name: Mask(1, tuple(range(dense.ref(name).shape[1]))) for name in names}
    result = against(dense_answers, damaged(dense, edits, tmp_path / "cut"), SETTINGS)
    assert not result.passed
    assert result.base_sound
    assert len(failed(result)) == 6
    assert sum(c.newly_broken.value > 0 for c in result.conditions) >= 4
    assert any("repetition" in a.new for a in result.answers)


@pytest.mark.slow
def test_a_collapse_that_needs_the_bos_fails_only_there(
    dense: Checkpoint, dense_answers: Answers, tmp_path: Path
) -> None:
    # a BOS that overflows, in the embedding only: the head keeps the old table, and no other text sees a change
    cut = tmp_path / "cut"
    shutil.copytree(dense.path, cut)
    name = next(name for name in dense.tensors if name.endswith("embed_tokens.weight"))
    shard = dense.ref(name).shard
    state = load_file(cut / shard)
    state["lm_head.weight"] = state[name].clone()
    state[name][2] = torch.finfo(torch.bfloat16).max
    save_file(state, cut / shard, metadata={"format": "pt"})
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((cut / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (cut / "config.json").write_text(json.dumps(config))

    result = against(dense_answers, open_checkpoint(cut), SETTINGS)
    assert not result.passed
    assert failed(result) == {("raw", True), ("chat", True), ("thinking", True)}
    for c in result.conditions:
        if c.bos:
            assert c.newly_broken.low > 0.25
            assert any("not finite" in reason for reason in c.reasons)
        else:
            assert c.identical == c.prompts
            assert c.nll_ratio is not None
            assert c.nll_ratio.value == 1.0
    save_canary(result, tmp_path / "canary.json")
    assert load_canary(tmp_path / "canary.json") == result


def test_the_same_folder_twice_is_fine_and_the_record_is_deterministic(tiny: Path, tmp_path: Path) -> None:
    base = open_checkpoint(tiny)
    first = run_canary(base, base, SHORT, tmp_path / "a", base_answers=tmp_path / "answers.json")
    second = run_canary(base, open_checkpoint(tiny), SHORT, tmp_path / "b", base_answers=tmp_path / "answers.json")
    assert first == second
    assert all(c.nll_ratio is not None and c.nll_ratio.value == 1.0 for c in first.conditions)
    assert not failed(first)
    record = (tmp_path / "a" / CANARY).read_bytes()
    assert record == (tmp_path / "b" / CANARY).read_bytes()
    assert str(tiny.parent).encode() not in record
    assert load_canary(tmp_path / "a" / CANARY) == first


def test_another_tokenizer_or_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = len(tokenizer["model"]["vocab"])
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        run_canary(open_checkpoint(tiny), open_checkpoint(tmp_path / "other"), SHORT, tmp_path / "out")
    wide = make_tiny(tmp_path / "wide", "dense", vocab_size=352, max_position_embeddings=2048)
    shutil.copy(tiny / "tokenizer.json", wide)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        run_canary(open_checkpoint(tiny), open_checkpoint(wide), SHORT, tmp_path / "out")
    shutil.copytree(tiny, tmp_path / "template")
    with open(tmp_path / "template" / "chat_template.jinja", "a") as f:
        f.write(" ")
    with pytest.raises(CheckpointError, match="another chat template"):
        run_canary(open_checkpoint(tiny), open_checkpoint(tmp_path / "template"), SHORT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("kept") / "answers.json"
    base_of(open_checkpoint(tiny), SHORT, file)
    return file


def test_kept_answers_are_read_back_as_they_were(tiny: Path, kept: Path) -> None:
    before = kept.read_bytes()
    base = open_checkpoint(tiny)
    assert base_of(base, SHORT, kept) == base_of(base, SHORT)
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("fingerprint", "0" * 64, "another model"),
        ("prompts_hash", "0" * 64, "other prompts"),
        ("settings_hash", "0" * 64, "other settings"),
        ("stack", {"torch": "0.1"}, "torch 0.1"),
        ("schema", 0, "older gemcut"),
        ("said", [], "conditions are missing"),
        ("extra", 1, "unknown key"),
    ],
)
def test_stale_or_foreign_answers_are_refused(
    tiny: Path, kept: Path, tmp_path: Path, key: str, value: object, says: str
) -> None:
    record = json.loads(kept.read_text())
    record[key] = value
    (tmp_path / "answers.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError) as refused:
        base_of(open_checkpoint(tiny), SHORT, tmp_path / "answers.json")
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 4


def test_other_settings_make_kept_answers_stale(tiny: Path, kept: Path) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        base_of(open_checkpoint(tiny), CanarySettings(max_new_tokens=5), kept)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_answers_are_refused(tiny: Path, kept: Path, tmp_path: Path, share: float) -> None:
    raw = kept.read_bytes()
    (tmp_path / "answers.json").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        base_of(open_checkpoint(tiny), SHORT, tmp_path / "answers.json")


def test_a_prompt_that_is_missing_from_the_file_is_noticed(tiny: Path, kept: Path, tmp_path: Path) -> None:
    record = json.loads(kept.read_text())
    del record["said"][3]["answers"][5]
    (tmp_path / "answers.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="missing or out of order"):
        base_of(open_checkpoint(tiny), SHORT, tmp_path / "answers.json")
