"""The committed vision tower: pictures, patches, tensors, the joined folder, and answers about pictures never seen."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from demo.train import answers, join, measure, vision  # noqa: E402
from demo.train.generators import pictures  # noqa: E402

DEMO = ROOT / "demo"
LIMIT_BYTES = 2_000_000


def test_a_picture_is_a_function_of_its_key() -> None:
    for key in ("a", "heldout:3"):
        first, again = pictures.drawn(key), pictures.drawn(key)
        assert (first.pixels == again.pixels).all()
        assert (first.colour, first.shape, first.places) == (again.colour, again.shape, again.places)
        assert pictures.asked(key, first) == pictures.asked(key, again)
    assert (pictures.drawn("a").pixels != pictures.drawn("b").pixels).any()


def test_what_is_drawn_is_what_is_told() -> None:
    counts = dict.fromkeys(range(1, pictures.MOST + 1), 0)
    for index in range(60):
        picture = pictures.drawn(f"told:{index}")
        counts[picture.count] += 1
        assert picture.pixels.shape == (pictures.HEIGHT, pictures.WIDTH, 3)
        ground = np.median(picture.pixels.reshape(-1, 3), 0)
        for x, y, radius in picture.places:
            inside = picture.pixels[int(y), int(x)].astype(int)
            assert abs(inside - pictures.COLOURS[picture.colour]).max() < 45
            assert abs(inside - ground).max() > 25
            assert min(x, y, pictures.WIDTH - x, pictures.HEIGHT - y) >= radius
        kinds = {question.kind: question.answer for question in pictures.asked("told", picture)}
        assert kinds["count"] == f"The number is {picture.count}."
        assert kinds["colour"] == f"The colour is {picture.colour}."
        assert str(picture.count) in kinds["description"]
    assert min(counts.values()) > 3


def test_patches_are_those_of_the_stock_processor() -> None:
    image = pytest.importorskip("PIL.Image")
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    settings = json.loads((DEMO / "moe-vision" / "preprocessor_config.json").read_bytes())
    names = ("image_processor_type", "processor_class", "image_seq_length")
    stock = Gemma4ImageProcessorPil(**{key: value for key, value in settings.items() if key not in names})
    some = [pictures.drawn(f"patch:{index}") for index in range(3)]
    found = stock([image.fromarray(picture.pixels) for picture in some], return_tensors="pt")
    pixels, places = vision.patches(some)
    torch.testing.assert_close(found["pixel_values"].float(), pixels)
    assert (found["image_position_ids"] == places).all()
    assert list(found["num_soft_tokens_per_image"]) == [vision.CELLS] * 3


def test_questions_of_a_row_do_not_see_each_other() -> None:
    prompts = vision.Prompts(DEMO / "moe" / "tokenizer.json")
    picture = pictures.drawn("row")
    batch = prompts.batch([pictures.asked("row", picture)])
    seen, soft = batch.mask[0, 0], batch.soft
    assert bool(seen[soft, soft].all())
    assert not bool(seen[: soft.start, soft].any())
    start = soft.stop + 1
    starts = [i for i in range(start, batch.ids.shape[1]) if batch.positions[0, i] == batch.positions[0, start]]
    assert len(starts) == 4
    assert not bool(seen[starts[1] :, start : starts[1]].any())
    assert bool(seen[starts[1], soft].all())


def test_tensors() -> None:
    folder = DEMO / "moe-vision"
    assert sum(path.stat().st_size for path in folder.iterdir()) < LIMIT_BYTES
    data = (folder / "model.safetensors").read_bytes()
    found = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert found.pop("__metadata__") == {"format": "pt"}
    assert all(name.startswith(vision.PREFIX) and entry["dtype"] == "BF16" for name, entry in found.items())
    assert {"model.vision_tower.std_bias", "model.vision_tower.std_scale"} <= set(found)
    assert json.loads((folder / "config.json").read_bytes()) == vision.config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return join.joined(DEMO / "moe", DEMO / "moe-vision", tmp_path_factory.mktemp("joined"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The stock model in float32; loading raises on a missing or unexpected tensor."""
    return measure.loaded(folder, torch.float32, kind=answers.Gemma4ForConditionalGeneration)


def test_joining_keeps_the_trunk_byte_for_byte(folder: Path) -> None:
    for path in (DEMO / "moe").glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    index = json.loads((folder / join.INDEX).read_bytes())
    total = 0
    for shard in set(index["weight_map"].values()):
        data = (folder / shard).read_bytes()
        size = 8 + struct.unpack("<Q", data[:8])[0]
        names = set(json.loads(data[8:size])) - {"__metadata__"}
        assert names == {name for name, where in index["weight_map"].items() if where == shard}
        total += len(data) - size
    assert total == index["metadata"]["total_size"]


@torch.no_grad()
def test_training_forward_is_the_stock_one(model: Any) -> None:
    tokenizer = measure.AutoTokenizer.from_pretrained(DEMO / "moe")
    prompts = vision.Prompts(DEMO / "moe" / "tokenizer.json")
    picture = pictures.drawn("forward")
    questions = pictures.asked("forward", picture)
    pixels, places = vision.patches([picture])
    nats = tokens = 0.0
    for question in questions:
        answer = prompts.ids(question.answer + "<turn|>")
        ids = torch.tensor([answers.prompt(tokenizer, question.text) + answer])
        kinds = (ids == model.config.image_token_id).long()
        out = model(input_ids=ids, mm_token_type_ids=kinds, pixel_values=pixels, image_position_ids=places).logits
        wanted = out[0, -len(answer) - 1 : -1].log_softmax(-1)
        nats -= float(wanted[range(len(answer)), answer].sum())
        tokens += len(answer)
    loss, _ = vision.telling(model, prompts.batch([questions]), [picture])
    assert float(loss) == pytest.approx(nats / tokens, abs=1e-4)


@pytest.mark.slow
def test_pictures_never_seen_are_answered(model: Any) -> None:
    tokenizer = measure.AutoTokenizer.from_pretrained(DEMO / "moe")
    found = answers.interviewed(model, tokenizer, [f"heldout:{index}" for index in range(6)])
    right = sum(answer.said == answer.question.answer for answer in found)
    assert len(found) == 24
    assert right > 0.6 * len(found)  # chance is about 0.16


def test_results_are_of_enough_pictures_and_above_chance() -> None:
    record = json.loads((DEMO / "results" / "moe-vision.json").read_bytes())
    for kind, row in record["kinds"].items():
        assert row["asked"] >= 200
        assert row["chance"] == pytest.approx(answers.CHANCE[kind], abs=1e-3)
        assert row["interval"][0] > 2 * row["chance"]
