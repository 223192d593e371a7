"""Class `science`: facts on elements, planets and units, and small formula calculations."""

import random
from collections.abc import Callable

from demo.train.document import Document
from demo.train.generators.exchange import Exchange, laid_out

# number, symbol, name, rounded atomic mass, group, period, kind
_TABLE = """
1 H hydrogen 1 1 1 gas;2 He helium 4 18 1 noble-gas;3 Li lithium 7 1 2 alkali-metal
4 Be beryllium 9 2 2 alkaline-earth-metal
5 B boron 11 13 2 metalloid;6 C carbon 12 14 2 non-metal;7 N nitrogen 14 15 2 gas;8 O oxygen 16 16 2 gas
9 F fluorine 19 17 2 halogen;10 Ne neon 20 18 2 noble-gas;11 Na sodium 23 1 3 alkali-metal
12 Mg magnesium 24 2 3 alkaline-earth-metal;13 Al aluminium 27 13 3 metal;14 Si silicon 28 14 3 metalloid
15 P phosphorus 31 15 3 non-metal;16 S sulfur 32 16 3 non-metal;17 Cl chlorine 35 17 3 halogen
18 Ar argon 40 18 3 noble-gas
19 K potassium 39 1 4 alkali-metal;20 Ca calcium 40 2 4 alkaline-earth-metal;21 Sc scandium 45 3 4 transition-metal
22 Ti titanium 48 4 4 transition-metal;23 V vanadium 51 5 4 transition-metal;24 Cr chromium 52 6 4 transition-metal
25 Mn manganese 55 7 4 transition-metal;26 Fe iron 56 8 4 transition-metal;27 Co cobalt 59 9 4 transition-metal
28 Ni nickel 59 10 4 transition-metal;29 Cu copper 64 11 4 transition-metal;30 Zn zinc 65 12 4 transition-metal
31 Ga gallium 70 13 4 metal;32 Ge germanium 73 14 4 metalloid;33 As arsenic 75 15 4 metalloid
34 Se selenium 79 16 4 non-metal
35 Br bromine 80 17 4 halogen;36 Kr krypton 84 18 4 noble-gas;37 Rb rubidium 85 1 5 alkali-metal
38 Sr strontium 88 2 5 alkaline-earth-metal;47 Ag silver 108 11 5 transition-metal
48 Cd cadmium 112 12 5 transition-metal
50 Sn tin 119 14 5 metal;51 Sb antimony 122 15 5 metalloid;53 I iodine 127 17 5 halogen;54 Xe xenon 131 18 5 noble-gas
55 Cs caesium 133 1 6 alkali-metal;56 Ba barium 137 2 6 alkaline-earth-metal;74 W tungsten 184 6 6 transition-metal
78 Pt platinum 195 10 6 transition-metal;79 Au gold 197 11 6 transition-metal;80 Hg mercury 201 12 6 transition-metal
82 Pb lead 207 14 6 metal;83 Bi bismuth 209 15 6 metal
"""
ELEMENTS = [row.split() for row in _TABLE.strip().replace("\n", ";").split(";")]
# name, order from the Sun, distance in million km, diameter in km, moons, day, kind
PLANETS = (
    ("Mercury", 1, 58, 4879, 0, "4223 hours", "rocky planet"),
    ("Venus", 2, 108, 12104, 0, "2802 hours", "rocky planet"),
    ("Earth", 3, 150, 12756, 1, "24 hours", "rocky planet"),
    ("Mars", 4, 228, 6792, 2, "25 hours", "rocky planet"),
    ("Jupiter", 5, 778, 142984, 95, "10 hours", "gas giant"),
    ("Saturn", 6, 1432, 120536, 146, "11 hours", "gas giant"),
    ("Uranus", 7, 2867, 51118, 28, "17 hours", "ice giant"),
    ("Neptune", 8, 4515, 49528, 16, "16 hours", "ice giant"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilojoules", "joules", 1000),
    ("kilowatts", "watts", 1000),
    ("volts", "millivolts", 1000),
)
BODIES = ["car", "train", "ball", "rocket", "cyclist", "boat", "stone", "sledge", "cart", "runner", "bird", "crate"]
MATERIALS = ["water", "oil", "iron", "copper", "glass", "ice", "wood", "lead", "gold", "aluminium"]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def element(rng: random.Random) -> Exchange:
    number, symbol, name, mass, group, period, kind = rng.choice(ELEMENTS)
    kind = kind.replace("-", " ")
    article = "an" if kind[0] in "aeiou" else "a"
    steps = (
        f"{_capital(name)} has the symbol {symbol} and the atomic number {number}. Its mass is about {mass} u;"
        f" it stands in "
        f"group {group} and period {period}; it is {article} {kind}."
    )
    question, answer = rng.choice(
        (
            (f"What is the chemical symbol of {name}?", f"The symbol of {name} is {symbol}."),
            (f"Which element has the symbol {symbol}?", f"{symbol} is the symbol of {name}."),
            (f"What is the atomic number of {name}?", f"The atomic number of {name} is {number}."),
            (f"Which element has the atomic number {number}?", f"The element with atomic number {number} is {name}."),
            (f"In which group of the periodic table is {name}?", f"{_capital(name)} is in group {group}."),
            (f"What is the atomic mass of {name}?", f"The atomic mass of {name} is about {mass} u."),
            (f"How many protons has an atom of {name}?", f"An atom of {name} has {number} protons."),
            (f"What kind of element is {name}?", f"{_capital(name)} is {article} {kind}."),
        )
    )
    return Exchange(question, steps, answer)


def neutrons(rng: random.Random) -> Exchange:
    number, _, name, mass, *_ = rng.choice(ELEMENTS)
    count = int(mass) - int(number)
    return Exchange(
        f"How many neutrons has an atom of {name} with mass number {mass}?",
        f"{_capital(name)} has the atomic number {number}, so it has {number} protons. "
        f"Neutrons = {mass} - {number} = {count}.",
        f"It has {count} neutrons.",
    )


def compared_elements(rng: random.Random) -> Exchange:
    first, second = rng.sample(ELEMENTS, 2)
    heavier = first if int(first[0]) > int(second[0]) else second
    return Exchange(
        f"Which has more protons, {first[2]} or {second[2]}?",
        f"{_capital(first[2])} has the atomic number {first[0]}. "
        f"{_capital(second[2])} has the atomic number {second[0]}.",
        f"{_capital(heavier[2])} has more protons.",
    )


def planet(rng: random.Random) -> Exchange:
    name, order, distance, diameter, moons, day, kind = rng.choice(PLANETS)
    article = "an" if kind[0] in "aeiou" else "a"
    steps = (
        f"{name} is {article} {kind}, the {ORDINALS[order - 1]} planet from the Sun. "
        f"Its distance is about {distance} million km, "
        f"its diameter about {diameter} km. It has {moons} known moons and its day lasts about {day}."
    )
    question, answer = rng.choice(
        (
            (f"How far is {name} from the Sun?", f"{name} is about {distance} million km from the Sun."),
            (f"How many moons has {name}?", f"{name} has {moons} known moons."),
            (f"What is the diameter of {name}?", f"The diameter of {name} is about {diameter} km."),
            (f"Which planet is the {ORDINALS[order - 1]} from the Sun?", f"It is {name}."),
            (f"How long is a day on {name}?", f"A day on {name} lasts about {day}."),
            (f"What kind of planet is {name}?", f"{name} is {article} {kind}."),
        )
    )
    return Exchange(question, steps, answer)


def compared_planets(rng: random.Random) -> Exchange:
    first, second = rng.sample(PLANETS, 2)
    if rng.random() < 0.5:
        winner = first if first[3] > second[3] else second
        return Exchange(
            f"Which is larger, {first[0]} or {second[0]}?",
            f"The diameter of {first[0]} is {first[3]} km. The diameter of {second[0]} is {second[3]} km.",
            f"{winner[0]} is larger.",
        )
    winner = first if first[2] < second[2] else second
    return Exchange(
        f"Which is closer to the Sun, {first[0]} or {second[0]}?",
        f"{first[0]} is at {first[2]} million km. {second[0]} is at {second[2]} million km.",
        f"{winner[0]} is closer to the Sun.",
    )


def conversion(rng: random.Random) -> Exchange:
    large, small, factor = rng.choice(UNITS)
    value = rng.randint(2, 60)
    if rng.random() < 0.6:
        return Exchange(
            f"How many {small} are {value} {large}?",
            f"There are {factor} {small} in one of the {large}. {value} * {factor} = {value * factor}.",
            f"{value} {large} are {value * factor} {small}.",
        )
    return Exchange(
        f"Convert {value * factor} {small} to {large}.",
        f"{factor} {small} make one. {value * factor} / {factor} = {value}.",
        f"{value * factor} {small} are {value} {large}.",
    )


def temperature(rng: random.Random) -> Exchange:
    celsius = rng.randint(-100, 400)
    kelvin = celsius + 273
    sign = f"- {-celsius}" if celsius < 0 else f"+ {celsius}"
    return Exchange(
        f"What is {celsius} degrees Celsius in kelvin?",
        f"Kelvin = Celsius + 273. 273 {sign} = {kelvin}.",
        f"It is {kelvin} K.",
    )


def _formula(
    quantity: str, law: str, unit: str, left: tuple[str, str], right: tuple[str, str], setting: str
) -> Callable[[random.Random], Exchange]:
    """A maker for `quantity = left * right`; `setting` is a sentence with {a}, {b} and {thing}."""

    def maker(rng: random.Random) -> Exchange:
        a, b = rng.randint(2, 40), rng.randint(2, 20)
        thing = rng.choice(MATERIALS if "{material}" in setting else BODIES)
        text = setting.format(a=a, b=b, thing=thing, material=thing)
        if rng.random() < 0.65:
            return Exchange(
                f"{text.format()} What is the {quantity}?",
                f"{_capital(quantity)} = {law}. {left[0]} = {a} {left[1]}, {right[0]} = {b} {right[1]}. "
                f"{a} * {b} = {a * b}.",
                f"The {quantity} is {a * b} {unit}.",
            )
        return Exchange(
            f"The {quantity} is {a * b} {unit} and the {left[0]} is {a} {left[1]}. What is the {right[0]}?",
            f"{_capital(quantity)} = {law}, so {right[0]} = {quantity} / {left[0]}. {a * b} / {a} = {b}.",
            f"The {right[0]} is {b} {right[1]}.",
        )

    return maker


distance = _formula(
    "distance", "speed * time", "m", ("speed", "m/s"), ("time", "s"), "A {thing} moves at {a} m/s for {b} s."
)
force = _formula(
    "force",
    "mass * acceleration",
    "N",
    ("mass", "kg"),
    ("acceleration", "m/s2"),
    "A {thing} of {a} kg is accelerated at {b} m/s2.",
)
voltage = _formula(
    "voltage",
    "resistance * current",
    "V",
    ("resistance", "ohm"),
    ("current", "A"),
    "A current of {b} A flows through a resistor of {a} ohm.",
)
mass = _formula(
    "mass",
    "density * volume",
    "g",
    ("density", "g/cm3"),
    ("volume", "cm3"),
    "A piece of {material} has a density of {a} g/cm3 and a volume of {b} cm3.",
)
work = _formula(
    "work", "force * distance", "J", ("force", "N"), ("distance", "m"), "A {thing} is pushed with {a} N over {b} m."
)
energy = _formula(
    "energy", "power * time", "J", ("power", "W"), ("time", "s"), "A motor in a {thing} gives {a} W for {b} s."
)
momentum = _formula(
    "momentum", "mass * speed", "kg m/s", ("mass", "kg"), ("speed", "m/s"), "A {thing} of {a} kg moves at {b} m/s."
)

MAKERS = (
    (element, 4.0),
    (neutrons, 1.0),
    (compared_elements, 1.0),
    (planet, 2.0),
    (compared_planets, 1.0),
    (conversion, 2.0),
    (temperature, 1.0),
    (distance, 0.8),
    (force, 0.8),
    (voltage, 0.8),
    (mass, 0.8),
    (work, 0.8),
    (energy, 0.8),
    (momentum, 0.8),
)


def _portrait(rng: random.Random) -> str:
    """A paragraph on one element or planet, sentences in varied order and wording."""
    if rng.random() < 0.75:
        number, symbol, name, mass_number, group, period, kind = rng.choice(ELEMENTS)
        kind = kind.replace("-", " ")
        lines = [
            rng.choice((f"Its chemical symbol is {symbol}.", f"Chemists write it as {symbol}.")),
            rng.choice(
                (
                    f"It stands in group {group} and period {period}.",
                    f"In the periodic table it is found in group {group}.",
                )
            ),
            rng.choice(
                (f"One atom has a mass of about {mass_number} u.", f"The atomic mass is about {mass_number} u.")
            ),
            rng.choice((f"Every atom of {name} has {number} protons.", f"Its nucleus holds {number} protons.")),
            rng.choice((f"It is classed with the {kind}s.".replace("gass", "gases"), f"Its kind is: {kind}.")),
        ]
        rng.shuffle(lines)
        head = rng.choice(
            (f"{_capital(name)} is the element with atomic number {number}.", f"Element {number} is called {name}.")
        )
        return " ".join([head, *lines[: rng.randint(3, 5)]])
    name, order, far, diameter, moons, day, kind = rng.choice(PLANETS)
    lines = [
        f"It is about {far} million km from the Sun.",
        f"Its diameter is about {diameter} km.",
        f"It has {moons} known moons." if moons != 1 else "It has one moon.",
        f"A day there lasts about {day}.",
    ]
    rng.shuffle(lines)
    return " ".join(
        [f"{name} is the {ORDINALS[order - 1]} planet from the Sun and a {kind}.".replace("a ice", "an ice"), *lines]
    )


def document(rng: random.Random, key: str) -> Document:
    if rng.random() < 0.2:
        return Document("science", key, text="\n\n".join(_portrait(rng) for _ in range(rng.randint(3, 6))) + "\n")
    return laid_out(rng, "science", key, MAKERS, count=(3, 6))
