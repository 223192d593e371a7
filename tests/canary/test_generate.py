"""Greedy answers through stock transformers: batching, BOS, losses and refusals, on real folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemcut.canary import CanarySettings
from gemcut.canary.generate import Speaker, answer, conditions_of, end_ids, markers_of
from gemcut.canary.prompts import PROMPTS
from gemcut.checkpoint import open_checkpoint
from gemcut.errors import CheckpointError, MissingError
from gemcut.records.canary import Answers
from gemcut.stream.rendering import open_tokenizer
from tiny import make_tiny

DEMO = Path(__file__).parents[2] / "demo"
SETTINGS = CanarySettings(max_new_tokens=8)
BOS = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("canary") / "base", "dense", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def tiny_answers(tiny: Path) -> Answers:
    return answer(open_checkpoint(tiny), SETTINGS)


@pytest.fixture(scope="module")
def demo() -> Speaker:
    return Speaker.open(open_checkpoint(DEMO / "dense"), CanarySettings(dtype="float32"))


def test_there_are_24_prompts_of_many_kinds() -> None:
    assert len(PROMPTS) == 24
    assert len({p.id for p in PROMPTS}) == 24
    assert len({p.kind for p in PROMPTS}) >= 8
    assert sum(p.reference is not None for p in PROMPTS) >= 8
    assert sum(not p.raw.isascii() for p in PROMPTS) >= 3


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_exactly_one_bos_or_none(kind: str) -> None:
    conditions, skipped = conditions_of(open_tokenizer(DEMO / kind))
    assert skipped == {}
    assert [(c.style, c.bos) for c in conditions] == [
        (style, bos) for style in ("raw", "chat", "thinking") for bos in (True, False)
    ]
    for condition in conditions:
        for question in condition.questions:
            assert question.ids.count(BOS) == (1 if condition.bos else 0)
            assert question.ids[0] == BOS or not condition.bos
            assert BOS not in question.reference
    with_bos, without = conditions[2], conditions[3]
    assert [q.ids[1:] for q in with_bos.questions] == [q.ids for q in without.questions]
    assert with_bos.questions[0].ids != conditions[4].questions[0].ids


def test_chat_prompts_end_where_the_model_begins() -> None:
    tokenizer = open_tokenizer(DEMO / "dense")
    conditions, _ = conditions_of(tokenizer)
    for condition in conditions[2:]:
        assert tokenizer.inner.decode(condition.questions[0].ids).endswith("<|turn>model\n")


def test_a_template_without_thinking_is_recorded(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text(template.read_text().replace("enable_thinking", "something_else"))
    conditions, skipped = conditions_of(open_tokenizer(tmp_path / "m"))
    assert [c.style for c in conditions] == ["raw", "raw", "chat", "chat"]
    assert set(skipped) == {"thinking, BOS", "thinking, no BOS"}
    template.unlink()
    conditions, skipped = conditions_of(open_tokenizer(tmp_path / "m"))
    assert [c.style for c in conditions] == ["raw", "raw"]
    assert len(skipped) == 4


def test_markers_and_endings_are_the_checkpoints_own(tiny: Path) -> None:
    assert {"<bos>", "<|channel>", "<turn|>"} <= set(markers_of(open_tokenizer(tiny)))
    assert end_ids(open_checkpoint(tiny)) == (1, 6)


def test_endings_come_from_config_where_generation_says_nothing(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{}")
    assert end_ids(open_checkpoint(tmp_path / "m")) == (1, 6)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["eos_token_id"], config["text_config"]["eos_token_id"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="ends an answer"):
        end_ids(open_checkpoint(tmp_path / "m"))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_batching_does_not_change_a_token_of_a_tiny_model(tmp_path: Path, kind: str) -> None:
    folder = make_tiny(tmp_path / "m", kind, dtype="float32", max_position_embeddings=2048)  # type: ignore[arg-type]
    speaker = Speaker.open(open_checkpoint(folder), SETTINGS)
    prompts = [[BOS, 70], [BOS, *range(40, 75)], [5, 80, 81], [BOS, 9, *range(100, 112)]]
    assert speaker.generate(prompts, 12) == [speaker.generate([p], 12)[0] for p in prompts]


@pytest.mark.slow
def test_batching_does_not_change_a_token_of_a_trained_model(demo: Speaker) -> None:
    conditions, _ = conditions_of(open_tokenizer(DEMO / "dense"))
    for condition in (conditions[1], conditions[4]):
        prompts = [q.ids for q in condition.questions]
        together = demo.generate(prompts, 24)
        assert together == [demo.generate([p], 24)[0] for p in prompts]
        assert together == demo.generate(prompts, 24)


def test_greedy_is_the_argmax_of_the_stock_model(tiny: Path) -> None:
    speaker = Speaker.open(open_checkpoint(tiny), SETTINGS)
    stock = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [BOS, 70, 71, 72]
    expected = []
    for _ in range(10):
        with torch.no_grad():
            token = int(stock(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax())
        expected.append(token)
        if token in (1, 6):
            break
    assert speaker.generate([[BOS, 70, 71, 72]], 10) == [expected]


def test_losses_are_the_stock_models(tiny: Path) -> None:
    speaker = Speaker.open(open_checkpoint(tiny), SETTINGS)
    stock = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()
    prompts, answers = [[BOS, 70], [BOS, 80, 81, 82], [BOS, 90]], [[71, 72, 73], [83], []]
    found = speaker.nats(prompts, answers)
    assert found[2] is None
    for p, a, nats in zip(prompts[:2], answers[:2], found[:2], strict=True):
        with torch.no_grad():
            logs = stock(input_ids=torch.tensor([p + a])).logits[0].double().log_softmax(-1)
        expected = -sum(float(logs[len(p) - 1 + i, token]) for i, token in enumerate(a)) / len(a)
        assert nats == pytest.approx(expected, rel=1e-5)


def test_answers_hold_every_prompt_and_spell_markers(tiny_answers: Answers) -> None:
    assert [len(said.answers) for said in tiny_answers.said] == [24] * 6
    for said in tiny_answers.said:
        for one in said.answers:
            assert 1 <= len(one.ids) <= 8
            assert one.ended == (one.ids[-1] in tiny_answers.end_ids)
            assert one.known_nats is not None
            assert not set(one.ids[:-1]) & set(tiny_answers.end_ids)
    assert tiny_answers.dtype == "float32"


def test_the_same_model_gives_the_same_answers(tiny: Path, tiny_answers: Answers) -> None:
    assert answer(open_checkpoint(tiny), SETTINGS) == tiny_answers
    again = answer(open_checkpoint(tiny), SETTINGS, known=tiny_answers)
    assert again == tiny_answers


def test_what_does_not_fit_is_refused_before_loading(tiny: Path) -> None:
    with pytest.raises(MissingError, match="whole model in memory") as refused:
        Speaker.open(open_checkpoint(tiny), CanarySettings(max_memory=1 << 20))
    assert "URL" in str(refused.value)
    assert "GiB" in str(refused.value)


def test_a_tensor_that_stays_random_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith("layers.2.mlp.up_proj.weight"))
    shard = tmp_path / "m" / index["weight_map"].pop(name)
    state = load_file(shard)
    del state[name]
    save_file(state, shard, metadata={"format": "pt"})
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="missing keys"):
        Speaker.open(open_checkpoint(tmp_path / "m", any_architecture=True), SETTINGS)
