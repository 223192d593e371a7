"""Pictures of a few equal shapes on a pale ground, and questions about them; a picture is a function of its key.

A picture is `[84, 120, 3]` uint8: 7 by 10 cells of 12 pixels, so that neither transformers nor llama.cpp resizes it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH = 84, 120
CELL = 12  # pixels of a soft token's side: patches of 4, pooled 3 by 3
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 210, 40),
    "black": (25, 25, 25),
    "white": (252, 252, 252),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
MOST = 5
SAMPLES = 3  # a side of the grid of samples a pixel


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn and where: centres (x, y) and radii in pixels."""

    colour: str
    shape: str
    places: tuple[tuple[float, float, float], ...]
    pixels: np.ndarray

    @property
    def count(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a kind and its only right answer."""

    kind: str
    text: str
    answer: str


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points, in radii from the centre, lie in the shape."""
    if shape == "circle":
        return x * x + y * y < 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "triangle":
        return (y < 0.75) & (1.6 * abs(x) - 0.9 < y)
    arms = np.minimum(abs(x), abs(y)) < 0.3
    return arms & (np.maximum(abs(x), abs(y)) < 1)


def _placed(rng: random.Random, count: int) -> tuple[tuple[float, float, float], ...]:
    """Centres and radii of `count` shapes that do not touch."""
    found: list[tuple[float, float, float]] = []
    while len(found) < count:
        radius = rng.uniform(8, 14)
        x, y = rng.uniform(radius, WIDTH - radius), rng.uniform(radius, HEIGHT - radius)
        if all((x - u) ** 2 + (y - v) ** 2 > (1.3 * (radius + r)) ** 2 for u, v, r in found):
            found.append((x, y, radius))
    return tuple(found)


def drawn(key: str) -> Picture:
    """The picture of a key: colour, shape, number, places, ground and noise are all drawn from it."""
    rng = random.Random(key)
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    places = _placed(rng, rng.randint(1, MOST))
    ground = np.array([rng.uniform(150, 200)] * 3) + [rng.uniform(-12, 12) for _ in range(3)]
    paint = np.array(COLOURS[colour]) + [rng.uniform(-18, 18) for _ in range(3)]
    steps = (np.arange(max(HEIGHT, WIDTH) * SAMPLES) + 0.5) / SAMPLES
    x, y = steps[None, : WIDTH * SAMPLES], steps[: HEIGHT * SAMPLES, None]
    covered = np.zeros((HEIGHT * SAMPLES, WIDTH * SAMPLES), dtype=bool)
    for u, v, radius in places:
        covered |= _inside(shape, (x - u) / radius, (y - v) / radius)
    share = covered.reshape(HEIGHT, SAMPLES, WIDTH, SAMPLES).mean((1, 3))[..., None]
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 5, (HEIGHT, WIDTH, 3))
    pixels = np.clip(ground * (1 - share) + paint * share + noise, 0, 255).round().astype(np.uint8)
    return Picture(colour, shape, places, pixels)


def _noun(picture: Picture) -> str:
    return picture.shape if picture.count == 1 else PLURALS[picture.shape]


def _colour(rng: random.Random, picture: Picture) -> Question:
    verb = "is" if picture.count == 1 else "are"
    text = rng.choice((f"What colour {verb} the {_noun(picture)}?", "Which colour do you see?"))
    return Question("colour", text, f"The colour is {picture.colour}.")


def _shape(rng: random.Random, picture: Picture) -> Question:
    return Question(
        "shape", rng.choice(("What shape is this?", "Which shape do you see?")), f"The shape is a {picture.shape}."
    )


def _count(rng: random.Random, picture: Picture) -> Question:
    text = rng.choice((f"How many {PLURALS[picture.shape]} are there?", "How many shapes do you see?"))
    return Question("count", text, f"The number is {picture.count}.")


def _description(rng: random.Random, picture: Picture) -> Question:
    text = rng.choice(("What is in the picture?", "Describe the picture."))
    return Question("description", text, f"The picture shows {picture.count} {picture.colour} {_noun(picture)}.")


KINDS: tuple[Callable[[random.Random, Picture], Question], ...] = (_colour, _shape, _count, _description)


def asked(key: str, picture: Picture) -> list[Question]:
    """One question of each kind about the picture, worded by the key."""
    rng = random.Random(f"{key}:asked")
    return [kind(rng, picture) for kind in KINDS]
