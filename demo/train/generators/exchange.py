"""Questions with worked answers, and the ways to lay them out as a document."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from demo.train.document import Document, Message


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, the steps that lead to the answer, and the answer as a sentence."""

    question: str
    steps: str
    answer: str


Maker = Callable[[random.Random], Exchange]


def chosen(rng: random.Random, makers: Sequence[tuple[Maker, float]]) -> Maker:
    """One maker, drawn in proportion to its weight."""
    return rng.choices([maker for maker, _ in makers], [weight for _, weight in makers])[0]


def _chat(exchanges: Sequence[Exchange], *, thinking: bool) -> tuple[Message, ...]:
    messages: list[Message] = []
    for item in exchanges:
        messages.append({"role": "user", "content": item.question})
        if thinking:
            messages.append({"role": "assistant", "reasoning_content": item.steps, "content": item.answer})
        else:
            messages.append({"role": "assistant", "content": f"{item.steps}\n{item.answer}"})
    return tuple(messages)


def _plain(rng: random.Random, exchanges: Sequence[Exchange]) -> str:
    ask, work, tell = rng.choice(
        [
            ("Problem", "Solution", "Answer"),
            ("Question", "Working", "Answer"),
            ("Q", "Steps", "A"),
            ("Exercise", "Reasoning", "Result"),
        ]
    )
    blocks = [f"{ask}: {item.question}\n{work}: {item.steps}\n{tell}: {item.answer}" for item in exchanges]
    return "\n\n".join(blocks) + "\n"


def laid_out(
    rng: random.Random, label: str, key: str, makers: Sequence[tuple[Maker, float]], *, count: tuple[int, int]
) -> Document:
    """A document of several exchanges: 45 % thinking chat, 25 % chat without thinking, 30 % plain text."""
    form = rng.random()
    number = rng.randint(*count)
    if rng.random() < 0.4:
        maker = chosen(rng, makers)
        exchanges = [maker(rng) for _ in range(number)]
    else:
        exchanges = [chosen(rng, makers)(rng) for _ in range(number)]
    if form < 0.70:
        return Document(label, key, messages=_chat(exchanges, thinking=form < 0.45))
    return Document(label, key, text=_plain(rng, exchanges))
