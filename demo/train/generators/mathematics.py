"""Class `math`: arithmetic with worked steps, word problems, equations, sequences."""

import random

from demo.train.document import Document
from demo.train.generators.exchange import Exchange, laid_out

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands")
NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mara",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Uwe",
    "Vera",
    "Will",
    "Yara",
    "Zoe",
    "Amir",
    "Bela",
    "Chen",
    "Dara",
    "Emil",
    "Fatima",
]
ITEMS = [
    "apples",
    "books",
    "pencils",
    "marbles",
    "stamps",
    "cards",
    "coins",
    "eggs",
    "shells",
    "buttons",
    "stickers",
    "oranges",
    "candles",
    "cups",
    "bricks",
    "tickets",
    "flowers",
    "stones",
    "ribbons",
    "bottles",
]
CONTAINERS = ("boxes", "bags", "baskets", "shelves", "crates", "drawers", "jars", "trays")


def _number(rng: random.Random, digits: tuple[int, ...] = (1, 2, 2, 2, 3, 3)) -> int:
    size = rng.choice(digits)
    return rng.randint(10 ** (size - 1) if size > 1 else 1, 10**size - 1)


def _asked(rng: random.Random, expression: str) -> str:
    return rng.choice(
        (
            "What is {}?",
            "What is {}?",
            "Calculate {}.",
            "Compute {}.",
            "Work out {}.",
            "Find {}.",
            "How much is {}?",
            "Please calculate {}.",
            "{} = ?",
            "Solve {}.",
            "Tell me the value of {}.",
        )
    ).format(expression)


def added(first: int, second: int) -> str:
    """Column addition, one sentence a column, carries named."""
    carry, parts, place = 0, [], 0
    while first // 10**place or second // 10**place:
        a, b = first // 10**place % 10, second // 10**place % 10
        total = a + b + carry
        with_carry = f" + {carry}" if carry else ""
        text = f"{PLACES[place]}: {a} + {b}{with_carry} = {total}"
        carry = total // 10
        parts.append(text + (f", write {total % 10}, carry {carry}" if carry else ""))
        place += 1
    if carry:
        parts.append(f"last carry: {carry}")
    return "; ".join(parts) + f". So {first} + {second} = {first + second}."


def subtracted(first: int, second: int) -> str:
    """Column subtraction for first >= second, borrows named."""
    borrow, parts, place = 0, [], 0
    while first // 10**place:
        a, b = first // 10**place % 10, second // 10**place % 10
        top = a - borrow
        used = f"{a} - {borrow}" if borrow else f"{a}"
        if top < b:
            parts.append(f"{PLACES[place]}: {used} is less than {b}, borrow: {top + 10} - {b} = {top + 10 - b}")
            borrow = 1
        else:
            parts.append(f"{PLACES[place]}: {used} - {b} = {top - b}")
            borrow = 0
        place += 1
    return "; ".join(parts) + f". So {first} - {second} = {first - second}."


def multiplied(first: int, second: int) -> str:
    """Products of the decimal parts of both numbers, then their running sum."""
    parts = [[int(d) * 10**p for p, d in enumerate(reversed(str(n))) if d != "0"][::-1] for n in (first, second)]
    products = [(a, b, a * b) for b in parts[1] for a in parts[0]]
    pieces = [f"{a} * {b} = {product}" for a, b, product in products]
    total = products[0][2] if products else 0
    for *_, product in products[1:]:
        pieces.append(f"{total} + {product} = {total + product}")
        total += product
    return "; ".join(pieces) + f". So {first} * {second} = {first * second}."


def addition(rng: random.Random) -> Exchange:
    first, second = _number(rng), _number(rng)
    return Exchange(
        _asked(rng, f"{first} + {second}"), added(first, second), _told(rng, f"{first} + {second}", first + second)
    )


def _told(rng: random.Random, expression: str, value: int | str) -> str:
    return rng.choice(("{} = {}.", "The answer is {1}.", "{} is {}.", "{} equals {}.")).format(expression, value)


def subtraction(rng: random.Random) -> Exchange:
    first, second = sorted((_number(rng), _number(rng)), reverse=True)
    expression = f"{first} - {second}"
    return Exchange(_asked(rng, expression), subtracted(first, second), _told(rng, expression, first - second))


def multiplication(rng: random.Random) -> Exchange:
    first, second = _number(rng, (1, 2, 2)), _number(rng, (1, 1, 2))
    sign = rng.choice(("*", "*", "times"))
    return Exchange(
        _asked(rng, f"{first} {sign} {second}"),
        multiplied(first, second),
        _told(rng, f"{first} * {second}", first * second),
    )


def division(rng: random.Random) -> Exchange:
    divisor = rng.randint(2, 12)
    value = _number(rng, (2, 2, 3))
    quotient, rest = divmod(value, divisor)
    steps = (
        f"{divisor} * {quotient} = {divisor * quotient}; {value} - {divisor * quotient} = {rest}; "
        f"{rest} is less than {divisor}. "
        f"So {value} / {divisor} = {quotient} remainder {rest}."
    )
    answer = (
        f"The quotient is {quotient} and the remainder is {rest}." if rest else f"{value} / {divisor} = {quotient}."
    )
    question = rng.choice(("Divide {} by {}.", "What is {} divided by {}?", "Compute {} / {} with remainder."))
    return Exchange(question.format(value, divisor), steps, answer)


def equation(rng: random.Random) -> Exchange:
    factor, solution, offset = rng.randint(2, 12), rng.randint(1, 20), rng.randint(1, 40)
    letter = rng.choice("xyzabn")
    if rng.random() < 0.5:
        right = factor * solution + offset
        text = f"{factor}{letter} + {offset} = {right}"
        first = f"Subtract {offset} from both sides: {factor}{letter} = {right} - {offset} = {right - offset}."
    else:
        right = factor * solution - offset
        text = f"{factor}{letter} - {offset} = {right}"
        first = f"Add {offset} to both sides: {factor}{letter} = {right} + {offset} = {right + offset}."
    steps = f"{first} Divide by {factor}: {letter} = {factor * solution} / {factor} = {solution}."
    question = rng.choice(("Solve {} for {}.", "If {}, what is {}?", "Find the value in {}, where {} is unknown."))
    return Exchange(question.format(text, letter), steps, f"{letter} = {solution}.")


def change_story(rng: random.Random) -> Exchange:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    have, change = _number(rng, (1, 2, 2)), _number(rng, (1, 1, 2))
    if rng.random() < 0.5:
        verb = rng.choice((f"buys {change} more", f"finds {change} more", f"gets {change} from {other}"))
        return Exchange(
            f"{name} has {have} {item} and {verb}. How many {item} does {name} have now?",
            f"The number grows, so we add. {added(have, change)}",
            f"{name} has {have + change} {item}.",
        )
    have, change = max(have, change), min(have, change)
    verb = rng.choice((f"gives {change} to {other}", f"loses {change}", f"sells {change}"))
    return Exchange(
        f"{name} has {have} {item} and {verb}. How many {item} are left?",
        f"The number shrinks, so we subtract. {subtracted(have, change)}",
        f"{name} has {have - change} {item} left.",
    )


def group_story(rng: random.Random) -> Exchange:
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(CONTAINERS)
    groups, each = rng.randint(2, 15), rng.randint(2, 30)
    if rng.random() < 0.6:
        return Exchange(
            f"{name} has {groups} {box} with {each} {item} in each. How many {item} are there in all?",
            f"Equal groups, so we multiply. {multiplied(each, groups)}",
            f"There are {groups * each} {item} in all.",
        )
    total = groups * each
    return Exchange(
        f"{name} puts {total} {item} into {groups} {box}, the same number in each. "
        f"How many {item} are in one of the {box}?",
        f"Equal sharing, so we divide. {groups} * {each} = {total}. So {total} / {groups} = {each}.",
        f"There are {each} {item} in each.",
    )


def sequence(rng: random.Random) -> Exchange:
    start, step = rng.randint(1, 60), rng.randint(2, 15)
    falling = rng.random() < 0.3
    if falling:
        step, start = -step, start + 5 * step
    terms = [start + index * step for index in range(5)]
    word = "falls" if falling else "grows"
    return Exchange(
        f"What number comes next: {', '.join(map(str, terms))}?",
        f"{terms[1]} - {terms[0]} = {terms[1] - terms[0]}; each term {word} by {abs(step)}. "
        f"{terms[-1]} {'-' if falling else '+'} {abs(step)} = {terms[-1] + step}.",
        f"The next number is {terms[-1] + step}.",
    )


def listing(rng: random.Random) -> Exchange:
    values = [_number(rng, (1, 2)) for _ in range(rng.randint(3, 5))]
    text = ", ".join(map(str, values))
    if rng.random() < 0.5:
        total, parts = values[0], []
        for value in values[1:]:
            parts.append(f"{total} + {value} = {total + value}")
            total += value
        return Exchange(f"Add up the numbers {text}.", "; ".join(parts) + ".", f"The sum is {total}.")
    largest = rng.random() < 0.5
    order = sorted(values, reverse=largest)
    word = "largest" if largest else "smallest"
    return Exchange(
        f"Which is the {word} of {text}?", f"In order: {', '.join(map(str, order))}.", f"The {word} is {order[0]}."
    )


def comparison(rng: random.Random) -> Exchange:
    first, second = _number(rng), _number(rng)
    sign = "=" if first == second else (">" if first > second else "<")
    steps = f"{first} has {len(str(first))} digits and {second} has {len(str(second))} digits. {first} {sign} {second}."
    answer = "They are equal." if first == second else f"{max(first, second)} is larger."
    return Exchange(f"Which is larger, {first} or {second}?", steps, answer)


MAKERS = (
    (addition, 4.0),
    (subtraction, 3.0),
    (multiplication, 3.0),
    (division, 2.0),
    (equation, 2.0),
    (change_story, 2.0),
    (group_story, 2.0),
    (sequence, 1.0),
    (listing, 1.0),
    (comparison, 0.7),
)


def document(rng: random.Random, key: str) -> Document:
    return laid_out(rng, "math", key, MAKERS, count=(2, 5))
