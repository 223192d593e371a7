"""Measure a drafter with stock transformers: does assisted greedy equal plain greedy, and how many drafts are accepted?

`python -m demo.train.acceptance demo/moe demo/moe-drafter --corpus demo/corpus/heldout.jsonl --out results.json`
"""

# torch and transformers leave these entry points without types
# mypy: disable-error-code="no-untyped-call,no-any-return"

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo.train.document import CLASSES
from demo.train.measure import items, loaded
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

PER_CLASS = 8
NEW_TOKENS = 96
RESAMPLES = 2000


@dataclass(slots=True)
class Rounds:
    """The rounds of one answer: how many tokens were drafted and how many of them the trunk accepted."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[Rounds]:
    """Rounds of every assisted generation while the context is open."""
    found, kind = Rounds(), SinglePositionMultiTokenCandidateGenerator
    draft, update = kind.get_candidates, kind.update_candidate_strategy

    def get_candidates(self: Any, input_ids: Any, *rest: Any, **named: Any) -> Any:
        out = draft(self, input_ids, *rest, **named)
        if out[1] is not None:
            found.drafted.append(out[0].shape[1] - input_ids.shape[1])
        return out

    def update_candidate_strategy(self: Any, input_ids: Any, scores: Any, num_matches: Any) -> Any:
        if len(found.accepted) < len(found.drafted):
            found.accepted.append(int(num_matches))
        return update(self, input_ids, scores, num_matches)

    kind.get_candidates, kind.update_candidate_strategy = get_candidates, update_candidate_strategy
    try:
        yield found
    finally:
        kind.get_candidates, kind.update_candidate_strategy = draft, update


def chats(corpus: Path, per_class: int) -> dict[str, list[tuple[list[Any], bool]]]:
    """The first so many chats of each class, up to the first answer, and whether that answer thinks."""
    found: dict[str, list[tuple[list[Any], bool]]] = {label: [] for label in CLASSES}
    for item in items(corpus):
        if "messages" not in item or len(found[item["class"]]) == per_class:
            continue
        said = item["messages"]
        asked = list(takewhile(lambda message: message["role"] != "assistant", said))
        found[item["class"]].append((asked, any(message.get("reasoning_content") for message in said)))
    return found


def prompts(corpus: Path, tokenizer: Any, per_class: int) -> dict[str, list[list[int]]]:
    """Token ids of the chats."""

    def ids(asked: list[Any], thinking: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {label: [ids(*chat) for chat in some] for label, some in chats(corpus, per_class).items()}


def answered(trunk: Any, ids: list[int], drafter: Any = None) -> list[int]:
    """The greedy answer, with a drafter or without."""
    stops = trunk.generation_config.eos_token_id
    named = {"assistant_model": drafter} if drafter is not None else {}
    inputs = torch.tensor([ids])
    out = trunk.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        top_k=None,
        top_p=None,
        temperature=None,
        eos_token_id=stops,
        pad_token_id=0,
        **named,
    )
    return list(out[0, len(ids) :].tolist())


def rate(rounds: list[Rounds], place: int | None = None) -> dict[str, object]:
    """Accepted over drafted with a 95 % interval from resampled answers; with `place`, of that draft of a round only.

    A draft after a refused one counts as drafted and not accepted, as llama.cpp counts it.
    """
    if place is None:
        taken = np.array([sum(one.accepted) for one in rounds])
        tried = np.array([sum(one.drafted) for one in rounds])
    else:
        taken = np.array([sum(a > place for a in one.accepted) for one in rounds])
        tried = np.array([sum(d > place for d in one.drafted) for one in rounds])
    draw = np.random.default_rng(0).integers(0, max(1, len(rounds)), (RESAMPLES, len(rounds)))
    low, high = np.quantile(taken[draw].sum(1) / np.maximum(1, tried[draw].sum(1)), [0.025, 0.975])
    return {
        "answers": len(rounds),
        "drafted": int(tried.sum()),
        "accepted": int(taken.sum()),
        "rate": round(float(taken.sum() / max(1, tried.sum())), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
    }


def measured(
    trunk: Any, drafter: Any, asked: dict[str, list[list[int]]], plain: dict[str, list[list[int]]], drafts: int
) -> dict[str, object]:
    """Answers with `drafts` tokens drafted a round: equal to plain greedy, accepted overall, a place and a class."""
    drafter.generation_config.num_assistant_tokens = drafts
    by_class: dict[str, list[Rounds]] = {}
    equal = total = 0
    for label, questions in asked.items():
        by_class[label] = []
        for ids, wanted in zip(questions, plain[label], strict=True):
            with recorded() as rounds:
                assisted = answered(trunk, ids, drafter)
            # An answer that ends inside a draft leaves a last round without a verdict.
            rounds.drafted = rounds.drafted[: len(rounds.accepted)]
            by_class[label].append(rounds)
            equal += wanted == assisted
            total += 1
    every = [one for found in by_class.values() for one in found]
    return {
        "prompts": total,
        "equal_to_greedy": equal,
        "overall": rate(every),
        "by_place": [rate(every, place) for place in range(drafts)],
        "by_class": {label: rate(found) for label, found in by_class.items() if found},
    }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trunk", type=Path)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.trunk)
    trunk = loaded(options.trunk, torch.float32)
    drafter = loaded(options.drafter, torch.float32, kind=Gemma4AssistantForCausalLM)
    asked = prompts(options.corpus, tokenizer, options.per_class)
    plain = {label: [answered(trunk, ids) for ids in questions] for label, questions in asked.items()}
    results = {str(drafts): measured(trunk, drafter, asked, plain, drafts) for drafts in options.drafts}
    record = {"new_tokens": NEW_TOKENS, "dtype": "float32", "drafts": results}
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
