"""The 24 prompts. Written for this purpose: none is from a benchmark or from the demo corpora.

They cover what a damaged model loses first: long regular forms (code, JSON), digits, chains of steps, other scripts,
and the plain ability to stop. Change one and every cached answer is stale: the hash says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gemcut.records.canary import Style
from gemcut.store import fingerprint


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in both forms.

    raw: the beginning of a text that the model goes on with. chat: what a user says.
    reference: a right answer for the teacher-forced ratio, in the words that follow `raw`; None where there are many.
    """

    id: str
    kind: str
    raw: str
    chat: str
    reference: str | None = None

    def text(self, style: Style) -> str:
        """The form that a style asks with."""
        return self.raw if style == "raw" else self.chat


PROMPTS = (
    Prompt(
        "code-prime",
        "code",
        'def is_prime(n):\n    """Return True if n is a prime number."""\n',
        "Write a Python function is_prime(n).",
    ),
    Prompt(
        "code-class",
        "code",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
        "Write a Python class Stack with the methods push and pop.",
    ),
    Prompt(
        "code-test",
        "code",
        "import unittest\n\nclass LengthTest(unittest.TestCase):\n    def test_empty(self):\n",
        "Write a unit test that checks that the length of an empty list is zero.",
    ),
    Prompt(
        "code-json",
        "code",
        '{"name": "lamp", "price": 12, "colours": ["red", "green"], "stock": {',
        "Give an example of a JSON object that describes a lamp.",
    ),
    Prompt(
        "prose-manual",
        "prose",
        "The function opens the file for reading and returns",
        "Explain what it means to open a file for reading.",
    ),
    Prompt(
        "prose-letter",
        "prose",
        "Dear neighbour,\n\nthank you for looking after our garden while we",
        "Write a short letter that thanks a neighbour for looking after the garden.",
    ),
    Prompt(
        "prose-rain",
        "prose",
        "Rain falls when the air can no longer hold its water. First",
        "Explain in two sentences why it rains.",
    ),
    Prompt("math-add", "arithmetic", "Problem: What is 21 + 34?\nAnswer: 21 + 34 =", "What is 21 + 34?", "55"),
    Prompt("math-divide", "arithmetic", "Problem: Divide 36 by 4.\nAnswer: 36 / 4 =", "What is 36 divided by 4?", "9"),
    Prompt(
        "math-apples",
        "arithmetic",
        "Problem: A box holds 6 apples. How many apples are in 3 boxes?\nSolution:",
        "A box holds 6 apples. How many apples are in 3 boxes?",
    ),
    Prompt(
        "math-larger",
        "arithmetic",
        "Problem: Which is larger, 318 or 92?\nAnswer:",
        "Which is larger, 318 or 92?",
        "318",
    ),
    Prompt(
        "logic-syllogism",
        "logic",
        "All robins are birds. Pip is a robin. So Pip is a",
        "All robins are birds. Pip is a robin. Is Pip a bird?",
        "bird",
    ),
    Prompt(
        "logic-rule",
        "logic",
        "If the door is open, then the room is cold. The door is open. Therefore",
        "If the door is open, then the room is cold. The door is open. Is the room cold?",
    ),
    Prompt(
        "logic-order",
        "logic",
        "Ana is taller than Ben. Ben is taller than Cleo. The tallest of the three is",
        "Ana is taller than Ben. Ben is taller than Cleo. Who is the tallest?",
        "Ana",
    ),
    Prompt(
        "science-symbol",
        "science",
        "Q: What is the chemical symbol of gold?\nA: The symbol of gold is",
        "What is the chemical symbol of gold?",
        "Au",
    ),
    Prompt(
        "science-planet",
        "science",
        "The planet that is closest to the Sun is called",
        "Which planet is closest to the Sun?",
        "Mercury",
    ),
    Prompt(
        "science-ice",
        "science",
        "Ice floats on water because",
        "Why does ice float on water?",
    ),
    Prompt(
        "story-lighthouse",
        "story",
        "Once there was an old keeper of a lighthouse, who",
        "Tell a short story about the keeper of a lighthouse.",
    ),
    Prompt(
        "story-fox",
        "story",
        "The fox looked at the frozen river and said:",
        "Write a story about a fox and a frozen river.",
    ),
    Prompt(
        "list-months",
        "list",
        "The months of the year are January, February, March,",
        "List the months of the year.",
        "April, May, June",
    ),
    Prompt("fact-capital", "fact", "The capital of France is", "What is the capital of France?", "Paris"),
    Prompt(
        "script-cyrillic", "script", "Столица России — это город", "Какой город является столицей России?", "Москва"
    ),
    Prompt("script-japanese", "script", "日本の首都は", "日本の首都はどこですか。", "東京"),
    Prompt("script-arabic", "script", "عاصمة مصر هي مدينة", "ما هي عاصمة مصر؟", "القاهرة"),
)


def prompts_hash() -> str:
    """sha256 of every prompt, in order."""
    return fingerprint({"prompts": [asdict(prompt) for prompt in PROMPTS]})
