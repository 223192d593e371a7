"""Class `logic`: syllogisms, orderings, rule chains, boolean evaluation, truth tables."""

import random
from collections.abc import Callable
from itertools import pairwise

from demo.train.document import Document
from demo.train.generators.exchange import Exchange, laid_out
from demo.train.generators.mathematics import NAMES

ONSETS = [
    "bl",
    "br",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sl",
    "sn",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
VOWELS = ["a", "e", "i", "o", "u", "oo", "ee"]
CODAS = ["b", "ck", "d", "g", "k", "l", "m", "mp", "n", "nk", "p", "rk", "rt", "s", "sk", "t", "x", "zz"]
TRAITS = [
    "round",
    "heavy",
    "quiet",
    "bright",
    "striped",
    "hollow",
    "warm",
    "brittle",
    "ancient",
    "rare",
    "gentle",
    "clever",
    "blue",
    "soft",
    "loud",
    "tame",
    "shiny",
    "bitter",
    "narrow",
    "fast",
]
RELATIONS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("heavier", "heaviest", "lightest"),
    ("richer", "richest", "poorest"),
)
RULES = (
    ("it rains", "the street is wet"),
    ("the street is wet", "the bus is late"),
    ("the bus is late", "Mia walks home"),
    ("the lamp is on", "the room is bright"),
    ("the room is bright", "the cat wakes up"),
    ("the cat wakes up", "the bird sings"),
    ("the door is open", "the alarm rings"),
    ("the alarm rings", "the guard comes"),
    ("the guard comes", "the gate closes"),
    ("the key is lost", "the box stays shut"),
    ("the river is high", "the bridge closes"),
    ("the bridge closes", "the train stops"),
    ("the oven is hot", "the bread rises"),
    ("the bread rises", "the baker smiles"),
)


CONNECTIVES: tuple[tuple[str, Callable[[bool, bool], bool]], ...] = (
    ("and", lambda a, b: a and b),
    ("or", lambda a, b: a or b),
    ("implies", lambda a, b: not a or b),
)


def _noun(rng: random.Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)


def syllogism(rng: random.Random) -> Exchange:
    first, second = _noun(rng), _noun(rng)
    trait, name = rng.choice(TRAITS), rng.choice(NAMES)
    kind = rng.randrange(4)
    if kind == 0:
        return Exchange(
            f"All {first}s are {trait}. {name} is a {first}. Is {name} {trait}?",
            f"Every {first} is {trait}, and {name} is one of the {first}s. So {name} must be {trait}.",
            f"Yes, {name} is {trait}.",
        )
    if kind == 1:
        return Exchange(
            f"All {first}s are {second}s. All {second}s are {trait}. Are all {first}s {trait}?",
            f"A {first} is a {second}, and every {second} is {trait}. So every {first} is {trait}.",
            f"Yes, all {first}s are {trait}.",
        )
    if kind == 2:
        return Exchange(
            f"All {first}s are {trait}. {name} is {trait}. Is {name} a {first}?",
            f"The rule goes from {first} to {trait}, not back. Other things can be {trait} too. It does not follow.",
            f"We cannot know whether {name} is a {first}.",
        )
    return Exchange(
        f"No {first} is {trait}. {name} is a {first}. Is {name} {trait}?",
        f"None of the {first}s is {trait}, and {name} is one of them. So {name} is not {trait}.",
        f"No, {name} is not {trait}.",
    )


def ordering(rng: random.Random) -> Exchange:
    more, most, least = rng.choice(RELATIONS)
    people = rng.sample(NAMES, rng.randint(3, 5))
    facts = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    rng.shuffle(facts)
    order = " > ".join(people)
    kind = rng.randrange(3)
    if kind == 0:
        question, answer = f"Who is the {most}?", f"{people[0]} is the {most}."
    elif kind == 1:
        question, answer = f"Who is the {least}?", f"{people[-1]} is the {least}."
    else:
        low, high = sorted(rng.sample(range(len(people)), 2))
        swapped = rng.random() < 0.5
        a, b = (people[high], people[low]) if swapped else (people[low], people[high])
        question = f"Is {a} {more} than {b}?"
        answer = f"No, {b} is {more} than {a}." if swapped else f"Yes, {a} is {more} than {b}."
    return Exchange(f"{' '.join(facts)} {question}", f"Put them in a row: {order}.", answer)


def chain(rng: random.Random) -> Exchange:
    start = rng.randrange(len(RULES))
    rules = [RULES[start]]
    for rule in RULES[start + 1 :]:
        if rule[0] == rules[-1][1] and len(rules) < 3:
            rules.append(rule)
    extra = rng.choice([rule for rule in RULES if rule not in rules])
    shown = [*rules, extra] if rng.random() < 0.6 else list(rules)
    rng.shuffle(shown)
    text = " ".join(f"If {a}, then {b}." for a, b in shown)
    if rng.random() < 0.6:
        steps = " ".join(f"Since {a}, {b}." for a, b in rules)
        return Exchange(
            f"{text} We know that {rules[0][0]}. Does it follow that {rules[-1][1]}?", steps, f"Yes, {rules[-1][1]}."
        )
    a, b = rules[-1]
    if rng.random() < 0.5:
        return Exchange(
            f"{text} We know that it is not true that {b}. Is it true that {a}?",
            f"If it were true that {a}, then it would be true that {b}. But that is not so.",
            f"No, it is not true that {a}.",
        )
    return Exchange(
        f"{text} We know only that {b}. Does it follow that {a}?",
        f"The rule says that {a} leads to this, but there may be another cause. It does not follow.",
        "No, it does not follow.",
    )


def _expression(rng: random.Random, depth: int, steps: list[str]) -> tuple[str, bool]:
    """A boolean expression and its value; every reduction is appended to `steps`."""
    if depth == 0:
        value = rng.random() < 0.5
        return str(value), value
    if rng.random() < 0.25:
        text, value = _expression(rng, depth - 1, steps)
        steps.append(f"not {value} = {not value}")
        return (f"not {text}" if depth == 1 else f"not ({text})"), not value
    left_text, left = _expression(rng, depth - 1, steps)
    right_text, right = _expression(rng, depth - 1, steps)
    word = rng.choice(("and", "or", "xor"))
    value = {"and": left and right, "or": left or right, "xor": left != right}[word]
    steps.append(f"{left} {word} {right} = {value}")
    if depth > 1:
        left_text, right_text = f"({left_text})", f"({right_text})"
    return f"{left_text} {word} {right_text}", value


def boolean(rng: random.Random) -> Exchange:
    steps: list[str] = []
    text, value = _expression(rng, rng.choice((1, 2, 2, 2, 3)), steps)
    question = rng.choice(("Evaluate: {}", "What is the value of {}?", "Is this true or false: {}?"))
    return Exchange(question.format(text), "; ".join(steps) + ".", f"The value is {value}.")


def table(rng: random.Random) -> Exchange:
    p, q = rng.sample("pqrst", 2)
    word, rule = rng.choice(CONNECTIVES)
    negated = rng.random() < 0.4
    formula = f"{p} {word} not {q}" if negated else f"{p} {word} {q}"
    rows, count = [], 0
    for a in (True, False):
        for b in (True, False):
            value = bool(rule(a, not b if negated else b))
            count += value
            rows.append(f"{p}={'TF'[not a]} {q}={'TF'[not b]}: {'TF'[not value]}")
    return Exchange(
        f"Write the truth table of {formula}. In how many rows is it true?",
        "\n".join(rows),
        f"It is true in {count} of 4 rows.",
    )


def membership(rng: random.Random) -> Exchange:
    first, second = _noun(rng), _noun(rng)
    letters = rng.sample("ABCDEFGHJK", 6)
    left, right = sorted(letters[:4]), sorted(letters[2:])
    word, result = rng.choice(
        (
            ("both", sorted(set(left) & set(right))),
            ("only the first", sorted(set(left) - set(right))),
            ("only the second", sorted(set(right) - set(left))),
        )
    )
    homes = {letter: "the first" if letter in left else "the second" for letter in letters}
    homes |= dict.fromkeys(set(left) & set(right), "both")
    steps = " ".join(f"{letter} is in {homes[letter]}." for letter in sorted(letters))
    return Exchange(
        f"The set {first} holds {', '.join(left)}. The set {second} holds {', '.join(right)}. Which are in {word}?",
        steps,
        f"In {word}: {', '.join(result)}.",
    )


def liar(rng: random.Random) -> Exchange:
    a, b = rng.sample(NAMES, 2)
    truthful = rng.random() < 0.5
    item, place = rng.choice(("key", "coin", "map", "ring", "letter")), rng.choice(("box", "drawer", "bag", "hat"))
    nature = "always tells the truth" if truthful else "always lies"
    said = rng.random() < 0.5
    claim = f"The {item} is in the {place}." if said else f"The {item} is not in the {place}."
    actual = said if truthful else not said
    fact = f"the {item} is {'' if actual else 'not '}in the {place}"
    return Exchange(
        f'{a} {nature}. {a} says to {b}: "{claim}" Is the {item} in the {place}?',
        f"{a} {nature}, so the statement is {'true' if truthful else 'false'}. Therefore {fact}.",
        f"{'Yes' if actual else 'No'}, {fact}.",
    )


MAKERS = ((syllogism, 2.0), (ordering, 3.0), (chain, 2.0), (boolean, 3.0), (table, 1.5), (membership, 1.5), (liar, 1.5))


def document(rng: random.Random, key: str) -> Document:
    return laid_out(rng, "logic", key, MAKERS, count=(2, 4))
