"""Measure the tower with stock transformers on pictures never seen: `python -m demo.train.answers FOLDER --out FILE`.

FOLDER is the joined one. Every picture is asked one question of each kind, apart; an answer is right when it is, word
for word, the only right one. Chance is what the likeliest answer would get by the way pictures are drawn.
"""

# torch and transformers leave these entry points without types
# mypy: disable-error-code="no-untyped-call,no-any-return"

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo.train.generators.pictures import COLOURS, MOST, SHAPES, Picture, Question, asked, drawn
from demo.train.measure import loaded
from demo.train.record import wilson
from demo.train.vision import CELLS, patches
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "count": 1 / MOST,
    "description": 1 / (len(COLOURS) * len(SHAPES) * MOST),
}
PICTURES = 200
NEW_TOKENS = 24
BATCH = 8


def prompt(tokenizer: Any, question: str) -> list[int]:
    """Token ids of the chat template with the picture's place filled, as the stock processor fills it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    filled = text.replace("<|image|>", "<|image>" + "<|image|>" * CELLS + "<image|>")
    return list(tokenizer(filled, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def said(model: Any, tokenizer: Any, pictures: list[Picture], question: str) -> list[str]:
    """The greedy answer to the same question about each picture."""
    ids = torch.tensor([prompt(tokenizer, question)]).expand(len(pictures), -1)
    pixels, places = patches(pictures)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=pixels.to(model.dtype),
        image_position_ids=places,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        top_k=None,
        top_p=None,
        temperature=None,
        pad_token_id=0,
    )
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out[:, ids.shape[1] :]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A question about the picture of a key, and what was said."""

    key: str
    question: Question
    said: str


def interviewed(model: Any, tokenizer: Any, keys: list[str]) -> list[Answer]:
    """One question of each kind about each picture; questions of the same words are answered in batches."""
    by_text: dict[str, list[tuple[str, Picture, Question]]] = {}
    for key in keys:
        picture = drawn(key)
        for question in asked(key, picture):
            by_text.setdefault(question.text, []).append((key, picture, question))
    found = []
    for text, pairs in by_text.items():
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            answers = said(model, tokenizer, [picture for _, picture, _ in part], text)
            found += [Answer(key, question, one) for (key, _, question), one in zip(part, answers, strict=True)]
    return found


def main() -> None:
    """Ask and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = loaded(options.folder, torch.float32, kind=Gemma4ForConditionalGeneration)
    right, wrong = dict.fromkeys(CHANCE, 0), []
    for answer in interviewed(model, tokenizer, [f"heldout:{index}" for index in range(options.pictures)]):
        question = answer.question
        right[question.kind] += answer.said == question.answer
        if answer.said != question.answer:
            wrong.append([answer.key, question.text, question.answer, answer.said])
    kinds = {
        kind: {
            "asked": options.pictures,
            "right": hits,
            "interval": [round(edge, 4) for edge in wilson(hits, options.pictures)],
            "chance": round(CHANCE[kind], 4),
        }
        for kind, hits in right.items()
    }
    record = {"dtype": "float32", "kinds": kinds, "wrong": wrong[:20]}
    options.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
