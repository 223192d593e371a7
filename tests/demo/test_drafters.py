"""The committed drafters: geometry, tensors, stock loading, assisted generation, and the training forward."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from demo.train import acceptance, drafter, measure  # noqa: E402
from demo.train.architecture import SHAPES  # noqa: E402

DEMO = ROOT / "demo"
MODELS = ("moe", "dense")
LIMIT_BYTES = 4_000_000


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))


@pytest.mark.parametrize("model", MODELS)
def test_geometry_is_the_trunks(model: str) -> None:
    trunk = json.loads((DEMO / model / "config.json").read_bytes())["text_config"]
    config = json.loads((DEMO / f"{model}-drafter" / "config.json").read_bytes())
    text = config["text_config"]
    for key in ("head_dim", "global_head_dim", "num_key_value_heads", "num_global_key_value_heads", "vocab_size"):
        assert text[key] == trunk[key], key
    assert text["sliding_window"] == trunk["sliding_window"]
    assert text["rope_parameters"] == trunk["rope_parameters"]
    assert config["backbone_hidden_size"] == trunk["hidden_size"] != text["hidden_size"]
    assert text["num_kv_shared_layers"] == text["num_hidden_layers"] == len(text["layer_types"])
    assert config == drafter.assistant_config(SHAPES[model])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / f"{model}-drafter" / name).read_bytes() == (DEMO / model / name).read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_tensors_hold_queries_only(model: str) -> None:
    folder = DEMO / f"{model}-drafter"
    assert sum(path.stat().st_size for path in folder.iterdir()) < LIMIT_BYTES
    found = header(folder / "model.safetensors")
    assert found.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in found.values()} == {"BF16"}
    assert not [name for name in found if any(part in name for part in ("k_proj", "v_proj", "k_norm", "lm_head"))]
    assert found["pre_projection.weight"]["shape"] == [drafter.HIDDEN, 2 * SHAPES[model].hidden]
    assert found["post_projection.weight"]["shape"] == [SHAPES[model].hidden, drafter.HIDDEN]


def test_a_query_sees_what_came_before_it() -> None:
    seen = drafter.masks(torch.tensor([[3, 6]]), 8, 4)
    assert seen["full_attention"][0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert seen["sliding_attention"][0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Name, trunk and drafter in float32; loading raises on a missing or unexpected tensor."""
    name = request.param
    trunk = measure.loaded(DEMO / name, torch.float32)
    helper = measure.loaded(DEMO / f"{name}-drafter", torch.float32, kind=acceptance.Gemma4AssistantForCausalLM)
    return name, trunk, helper


def prompts(name: str, per_class: int) -> list[list[int]]:
    tokenizer = measure.AutoTokenizer.from_pretrained(DEMO / name)
    asked = acceptance.prompts(DEMO / "corpus" / "heldout.jsonl", tokenizer, per_class)
    return [ids for questions in asked.values() for ids in questions]


@torch.no_grad()
def test_training_forward_is_the_stock_one(pair: tuple[str, Any, Any]) -> None:
    """Many places at once give what one place after another gives, with the drafter's own state fed back."""
    name, trunk, helper = pair
    ids = torch.tensor([prompts(name, 1)[-1] * 3])[:, :100]
    places = torch.tensor([[5, 40, 90]])
    at_once = drafter.drafted(helper, trunk, drafter.seen(trunk, ids), places, SHAPES[name].window)
    for column, place in enumerate(places[0].tolist()):
        before = drafter.seen(trunk, ids[:, :place])
        state = before.states[:, -1:]
        for draft in range(drafter.DRAFTS):
            token = trunk.get_input_embeddings()(ids[:, place + draft, None])
            out = helper(
                inputs_embeds=torch.cat([token, state], -1),
                position_ids=torch.tensor([[place]]),
                shared_kv_states=before.shared,
            )
            state = out.last_hidden_state
            torch.testing.assert_close(at_once[draft][:, column], out.logits[:, 0], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_assisted_generation_equals_greedy_and_most_first_drafts_are_taken(pair: tuple[str, Any, Any]) -> None:
    name, trunk, helper = pair
    helper.generation_config.num_assistant_tokens = 3
    rounds = []
    for ids in prompts(name, 1):
        plain = acceptance.answered(trunk, ids)
        with acceptance.recorded() as one:
            assert acceptance.answered(trunk, ids, helper) == plain
        rounds.append(one)
    first = acceptance.rate(rounds, 0)
    assert isinstance(first["rate"], float)
    assert first["rate"] > 0.5


@pytest.mark.parametrize("model", MODELS)
def test_results_are_of_enough_prompts_and_all_equal(model: str) -> None:
    record = json.loads((DEMO / "results" / f"{model}-drafter.json").read_bytes())
    for drafts, row in record["drafts"].items():
        assert row["prompts"] >= 30
        assert row["equal_to_greedy"] == row["prompts"]
        assert len(row["by_place"]) == int(drafts)
        low, high = row["by_place"][0]["interval"]
        assert 0.5 < low <= row["by_place"][0]["rate"] <= high <= 1


def test_rate_counts_drafts_after_a_refused_one() -> None:
    rounds = [acceptance.Rounds(drafted=[3, 3], accepted=[3, 1]), acceptance.Rounds(drafted=[2], accepted=[0])]
    assert acceptance.rate(rounds)["rate"] == 0.5
    assert acceptance.rate(rounds, 2)["drafted"] == 2
    assert acceptance.rate(rounds, 2)["accepted"] == 1
