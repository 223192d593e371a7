"""The committed demo checkpoints: hashes, tokenizer, template, corpora, and that stock transformers loads them."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from demo.train import corpora, record, text, vocabulary  # noqa: E402
from demo.train.architecture import PREFIX, SHAPES, tensors  # noqa: E402
from demo.train.document import CLASSES, rendered_chat  # noqa: E402
from demo.train.optimizer import schedule  # noqa: E402

DEMO = ROOT / "demo"
MODELS = ("moe", "dense")
LIMIT_BYTES = {"moe": 28_000_000, "dense": 18_000_000}
SEED = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "moe" / "tokenizer.json"))


def corpus(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "corpus" / f"{split}.jsonl").read_bytes().split(b"\n") if line]


def test_hashes_match() -> None:
    lines = (DEMO / "SHA256SUMS").read_text().splitlines()
    named = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    there = {
        path.relative_to(DEMO).as_posix()
        for folder in record.FOLDERS
        for path in (DEMO / folder).iterdir()
        if path.is_file()
    }
    assert there <= set(named)
    for name, digest in named.items():
        assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("model", MODELS)
def test_index_and_sizes(model: str) -> None:
    folder = DEMO / model
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert sum(path.stat().st_size for path in folder.iterdir()) < LIMIT_BYTES[model]
    found, total = {}, 0
    for shard in sorted(folder.glob("*.safetensors")):
        data = shard.read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            assert entry["dtype"] == "BF16"
            found[name] = (shard.name, tuple(entry["shape"]))
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {name: shard for name, (shard, _) in found.items()}
    wanted = {f"{PREFIX}{name}": shape for name, (shape, _) in tensors(SHAPES[model]).items()}
    assert {name: shape for name, (_, shape) in found.items()} == wanted


@pytest.mark.parametrize("model", MODELS)
def test_config_keeps_the_flat_keys(model: str) -> None:
    config = json.loads((DEMO / model / "config.json").read_bytes())
    generation = json.loads((DEMO / model / "generation_config.json").read_bytes())
    assert config["text_config"]["global_head_dim"] == SHAPES[model].global_head_dim
    assert config["text_config"]["num_global_key_value_heads"] == SHAPES[model].global_kv_heads
    assert "per_layer_config" not in config["text_config"]
    assert config["vision_config"] is None
    assert generation["eos_token_id"] == [1, vocabulary.SPECIAL.index("<turn|>")]


def test_both_models_share_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / "moe" / name).read_bytes() == (DEMO / "dense" / name).read_bytes()


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    for index, token in enumerate(vocabulary.SPECIAL):
        assert tokenizer.token_to_id(token) == index
        assert tokenizer.encode(token).ids == [index]
    assert (vocabulary.SPECIAL[:4]) == ("<pad>", "<eos>", "<bos>", "<unk>")
    assert tokenizer.encode("a").ids == tokenizer.encode("a", add_special_tokens=True).ids


@pytest.mark.parametrize(
    "written",
    [
        "def f(x):\n        return x[12] + 3407\n\n\n\n\nclass A:",
        " leading and trailing  ",
        "naïve façade, 日本語, Ωμέγα, \t tab, 😀 👩‍👩‍👧 \u2028 \x00 end",
        "\n\n\n\n\n\n\n" + " " * 77 + "x",
        "",
    ],
)
def test_round_trip(tokenizer: Tokenizer, written: str) -> None:
    encoding = tokenizer.encode(written, add_special_tokens=False)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == written
    assert vocabulary.SPECIAL.index("<unk>") not in encoding.ids


def test_digits_stay_alone_and_no_merge_crosses_a_newline() -> None:
    model = json.loads((DEMO / "moe" / "tokenizer.json").read_bytes())["model"]
    for token in model["vocab"]:
        if token in vocabulary.SPECIAL or token in vocabulary.BYTES:
            continue
        assert len(token) == 1 or not any(char.isdigit() for char in token), token
        assert "\n" not in token or set(token) == {"\n"}, token


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_corpus(split: str, tokenizer: Tokenizer) -> None:
    items = corpus(split)
    assert len({item["id"] for item in items}) == len(items) == 40 * len(CLASSES)
    for label in CLASSES:
        assert sum(item["class"] == label for item in items) == 40
    for item in items:
        assert item["weight"] == 1.0
        body = rendered_chat(item["messages"]) if "messages" in item else f"<bos>{item['text']}"
        ids = tokenizer.encode(body, add_special_tokens=False).ids
        assert ids.count(2) == 1
        assert ids[0] == 2
        assert 100 <= len(ids) <= 500
    assert (DEMO / "corpus" / f"{split}.jsonl").stat().st_size < 750_000


def test_corpora_are_disjoint() -> None:
    seen = [
        {json.dumps(item.get("messages") or item["text"]) for item in corpus(s)} for s in ("calibration", "heldout")
    ]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_generated_items_come_again_byte_for_byte(split: str, tokenizer: Tokenizer) -> None:
    written = (DEMO / "corpus" / f"{split}.jsonl").read_bytes().decode().split("\n")
    wanted = [line for line in written if line and json.loads(line)["class"] in text.GENERATORS]
    assert sorted(corpora.generated_lines(split, tokenizer, SEED)) == sorted(wanted)


def test_training_text_holds_no_held_out_question() -> None:
    held = text.held_questions(SEED)
    for label in text.GENERATORS:
        for document in text.generated(label, "train", 300, SEED):
            assert document.key.startswith(f"{SEED}:train:")
    assert len(held) > 300


def test_code_and_prose_are_split_by_file() -> None:
    splits = [text.split_of(f"code:module{i}.py") for i in range(4000)]
    assert splits == [text.split_of(f"code:module{i}.py") for i in range(4000)]
    for split in ("calibration", "heldout"):
        assert 0.01 < splits.count(split) / len(splits) < 0.03


def test_template_is_the_python_rendering() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "moe")
    for item in corpus("heldout"):
        if "messages" in item:
            shown = tokenizer.apply_chat_template(item["messages"], tokenize=False)
            assert shown == rendered_chat(item["messages"])
            assert shown.count("<bos>") == 1
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert (
        prompt == "<bos><|turn>user\nWhat is 2 + 3?<turn|>\n<|turn>model\n" == rendered_chat(question, generation=True)
    )
    thinking = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinking.startswith("<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n")
    assert tokenizer("a b").input_ids[0] != 2


def test_loaded_tokenizer_gives_the_ids_of_the_file(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(DEMO / "moe")
    for item in corpus("calibration")[::7]:
        body = rendered_chat(item["messages"]) if "messages" in item else item["text"]
        assert loaded(body, add_special_tokens=False).input_ids == tokenizer.encode(body, add_special_tokens=False).ids


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    from demo.train.train import Rows

    generator = np.random.default_rng(0)
    for label in CLASSES:
        np.save(tmp_path / f"{label}-train.npy", generator.integers(0, 4096, (7, 513), dtype=np.uint16))
    first, again = Rows(tmp_path, "train", 1), Rows(tmp_path, "train", 1)
    first.batch(0)
    assert (first.batch(5)[0] == again.batch(5)[0]).all()
    assert (first.batch(5)[0] != Rows(tmp_path, "train", 2).batch(5)[0]).any()


def test_schedule_plateau_does_not_depend_on_the_number_of_steps() -> None:
    assert [schedule(step, 1000) for step in range(600)] == [schedule(step, 2000) for step in range(600)]
    assert schedule(999, 1000) <= 0.02 < schedule(601, 1000) < 1


def test_routing_record_is_about_this_model() -> None:
    record = json.loads((DEMO / "moe-routing.json").read_bytes())
    assert len(record["layers"]) == SHAPES["moe"].layers
    for layer in record["layers"]:
        for label in CLASSES:
            assert len(layer["share"][label]) == SHAPES["moe"].experts
            assert sum(layer["share"][label]) == pytest.approx(1, abs=1e-3)
        assert all(0 <= bits <= 1 for bits in layer["jensen_shannon_bits"].values())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_stock_transformers_loads_it_and_agrees_with_the_training_forward(model: str) -> None:
    import torch
    from demo.train import measure, trunk

    torch._dynamo.config.disable = True
    try:
        stock = measure.loaded(DEMO / model, torch.float32)  # raises on a missing or unexpected tensor
        weights = {
            name.removeprefix(PREFIX): value.float()
            for name, value in stock.state_dict().items()
            if name.startswith(PREFIX)
        }
        tokenizer = measure.AutoTokenizer.from_pretrained(DEMO / model)
        for item in corpus("heldout")[::60]:
            ids = measure.token_ids(tokenizer, item)
            ids = (ids * 6)[: 4 * SHAPES[model].window + 1]
            stock_loss = measure.item_losses(stock, [ids])
            row = torch.tensor([ids])
            with torch.no_grad():
                loss = trunk.forward(SHAPES[model], weights, row[:, :-1], row[:, 1:]).loss
            assert float(loss) == pytest.approx(stock_loss.nats[0] / stock_loss.tokens[0], abs=0.03)
    finally:
        torch._dynamo.config.disable = False
