"""Class `creative`: short stories and verses from a grammar with a varied vocabulary."""

import random

from demo.train.document import Document, Message

HEROES = [
    "fox",
    "hare",
    "owl",
    "miller",
    "sailor",
    "baker",
    "girl",
    "boy",
    "gardener",
    "weaver",
    "shepherd",
    "clockmaker",
    "painter",
    "heron",
    "badger",
    "otter",
    "piper",
    "widow",
    "knight",
    "carpenter",
    "fisherman",
    "mouse",
    "crow",
    "tailor",
    "beekeeper",
    "lamplighter",
]
ADJECTIVES = [
    "small",
    "brave",
    "tired",
    "curious",
    "lonely",
    "stubborn",
    "quiet",
    "cheerful",
    "clumsy",
    "patient",
    "proud",
    "gentle",
    "restless",
    "old",
    "young",
    "shy",
    "hungry",
    "clever",
    "forgetful",
    "hopeful",
]
NAMES = [
    "Alba",
    "Bram",
    "Cora",
    "Dunn",
    "Edda",
    "Finn",
    "Greta",
    "Hale",
    "Ivo",
    "Jory",
    "Kestrel",
    "Lumi",
    "Milo",
    "Nell",
    "Orin",
    "Pia",
    "Quill",
    "Runa",
    "Sorrel",
    "Tomas",
    "Una",
    "Vesper",
    "Wren",
    "Yorick",
    "Zelda",
]
PLACES = [
    "a village under the mountain",
    "the harbour at the end of the world",
    "a forest that hummed at night",
    "an island of black sand",
    "a town built on stilts",
    "the valley of seven mills",
    "a house with a crooked chimney",
    "the edge of a frozen lake",
    "a market beside the river",
    "an orchard behind the monastery",
    "a lighthouse on the cliffs",
    "a meadow full of bells",
]
WANTS = [
    "find the lost song of the river",
    "mend the broken moon",
    "learn the name of the wind",
    "win back the stolen lantern",
    "plant a tree that could speak",
    "cross the bridge of glass",
    "bake bread for the whole winter",
    "write a letter to the sea",
    "catch the last firefly of summer",
    "open the door without a key",
    "bring the rain home",
    "teach the bells to sing",
]
WEATHER = [
    "The snow fell without a sound",
    "A warm wind came from the south",
    "Rain drummed on every roof",
    "Fog lay over the fields",
    "The stars were out early",
    "Thunder rolled behind the hills",
    "The sun was low and red",
    "Frost drew flowers on the windows",
]
TROUBLES = [
    "the path was gone",
    "a wolf stood in the way",
    "the bridge had fallen",
    "nobody would listen",
    "the map was upside down",
    "the lamp went out",
    "a giant slept across the road",
    "the boat began to leak",
    "all the clocks had stopped",
    "the gate was locked",
]
HELPERS = [
    "an old woman with a basket of keys",
    "a talking kettle",
    "a boy who counted stars",
    "a blind musician",
    "a very polite bear",
    "a travelling tinker",
    "a cat with one white ear",
    "a ferryman who never slept",
    "three sisters in green coats",
    "a snail in no hurry",
]
GIFTS = [
    "a silver thread",
    "a piece of chalk",
    "a handful of salt",
    "a small brass whistle",
    "a feather as light as breath",
    "a jar of honey",
    "a coin with a hole in it",
    "a pocket full of seeds",
    "a candle that burned blue",
    "a blanket of wool",
]
ADVICE = [
    "Go slowly, and the road will come to you",
    "What you are looking for is behind you",
    "Never ask a river the same thing twice",
    "Give away the thing you love least",
    "Listen before you knock",
    "A closed door is only a shy wall",
    "Share your bread first",
]
LESSONS = [
    "some things are found only by those who stop looking",
    "a kind word weighs nothing and opens everything",
    "home is the place where someone keeps the light on",
    "the smallest voice can wake a mountain",
    "patience is a kind of courage",
    "a promise is a seed",
    "even the night is afraid sometimes",
    "nobody is lost who can still sing",
]
MOODS = ["sad", "funny", "strange", "quiet", "hopeful", "gentle", "dark", "merry"]
FEELINGS = [
    "afraid",
    "glad",
    "ashamed",
    "full of wonder",
    "too tired to speak",
    "strangely calm",
    "ready to turn back",
    "braver than before",
]
NOUNS = [
    "river",
    "moon",
    "stone",
    "candle",
    "bird",
    "window",
    "shadow",
    "garden",
    "bell",
    "road",
    "star",
    "winter",
    "leaf",
    "door",
    "harbour",
    "lamp",
]
VERBS = [
    "sleeps",
    "waits",
    "sings",
    "turns",
    "listens",
    "falls",
    "wanders",
    "shines",
    "trembles",
    "remembers",
    "opens",
    "returns",
]
WHEN = [
    "at dawn",
    "at night",
    "in the snow",
    "without a sound",
    "far from home",
    "under the hill",
    "beside the sea",
    "after the rain",
]


class Tale:
    """One draw of hero, place, want, trouble, helper, gift and lesson."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.name, self.hero, self.adjective = rng.choice(NAMES), rng.choice(HEROES), rng.choice(ADJECTIVES)
        self.place, self.want, self.trouble = rng.choice(PLACES), rng.choice(WANTS), rng.choice(TROUBLES)
        self.helper, self.gift, self.lesson = rng.choice(HELPERS), rng.choice(GIFTS), rng.choice(LESSONS)
        self.subject, self.object, self.owner = rng.choice((("she", "her", "her"), ("he", "him", "his")))
        self.article = "an" if self.adjective[0] in "aeiou" else "a"
        self.mood = rng.choice(MOODS)

    def opening(self) -> str:
        pick, name = self.rng.choice, self.name
        being = f"{self.article} {self.adjective} {self.hero}"
        return pick(
            (
                f"In {self.place} there lived {being} named {name}. More than anything, {name} wanted to {self.want}.",
                f"Once there was {being} called {name}, who lived in {self.place} "
                f"and dreamed of one thing: to {self.want}.",
                f"{name} was {being}. Everyone in {self.place} knew that {name} meant to {self.want}, "
                f"and everyone laughed.",
                f'"I will {self.want}," said {name}, {being} from {self.place}, "and nobody shall stop me."',
            )
        )

    def middle(self) -> str:
        pick, name, she, her, rng = self.rng.choice, self.name, self.subject, self.object, self.rng
        lines = [
            pick(
                (
                    f"{pick(WEATHER)} on the day {she} set out.",
                    f"One morning {name} packed a bag and left. {pick(WEATHER)}.",
                    f"{pick(WEATHER)}, but {name} did not wait.",
                )
            ),
            pick(
                (
                    f"Before noon {self.trouble}.",
                    f"Soon {self.trouble}, and {name} was {pick(FEELINGS)}.",
                    f"But after a while {self.trouble}. {name.capitalize()} sat down and was {pick(FEELINGS)}.",
                )
            ),
            pick(
                (
                    f"Then {self.helper} came along and gave {her} {self.gift}.",
                    f"There {she} met {self.helper}, who carried {self.gift}.",
                    f'"You look {pick(FEELINGS)}," said {self.helper}, and held out {self.gift}.',
                )
            ),
            pick(
                (
                    f'"{pick(ADVICE)}," said the stranger.',
                    f'"{pick(ADVICE)}," {name} heard, and thought about it for a long time.',
                    f'{name} shared {self.owner} supper, and was told: "{pick(ADVICE)}."',
                )
            ),
        ]
        if rng.random() < 0.6:
            lines.append(
                pick(
                    (
                        f"{pick(WEATHER)} when {she} walked on.",
                        f"For {rng.randint(2, 9)} days {she} walked, and {she} was {pick(FEELINGS)}.",
                        f"The {pick(NOUNS)} {pick(VERBS)} {pick(WHEN)}, thought {name}, and so do I.",
                    )
                )
            )
        return " ".join(lines)

    def ending(self) -> str:
        pick, name, she = self.rng.choice, self.name, self.subject
        thing = self.gift.split(" ", 1)[1]
        return pick(
            (
                f"In the end the {thing} was all {she} needed. {name} did {self.want}, and learned that {self.lesson}.",
                f"{name} never did {self.want}. But {she} came home and told the children that {self.lesson}.",
                f"When {she} came back, the {thing} was still in {self.owner} hand. "
                f'"Now I know," said {name}, "that {self.lesson}."',
                f"And so it was done. They still say in {self.place} that {self.lesson}.",
            )
        )

    def story(self) -> str:
        gap = self.rng.choice(("\n\n", " ", "\n"))
        return gap.join((self.opening(), self.middle(), self.ending()))

    def plan(self) -> str:
        return (
            f"Hero: {self.name}, {self.article} {self.adjective} {self.hero}. "
            f"Place: {self.place}. Wish: to {self.want}. "
            f"Trouble: {self.trouble}. Help: {self.helper} with {self.gift}. Ending: {self.lesson}."
        )

    def request(self) -> str:
        return self.rng.choice(
            (
                f"Write a short story about {self.article} {self.adjective} {self.hero} named {self.name}.",
                f"Tell me a {self.mood} story set in {self.place}.",
                f"Write a story about a {self.hero} who wants to {self.want}.",
                f"Please invent a tale with {self.helper} and {self.gift}.",
                f"I would like a story about {self.name} the {self.hero}. It should end with a lesson.",
                f"Write a fairy tale in which {self.trouble}.",
            )
        )


def verse(rng: random.Random) -> tuple[str, str, str]:
    """Request, plan and text of a small poem: lines of noun, verb and circumstance."""
    noun, second = rng.sample(NOUNS, 2)
    lines = []
    for index in range(rng.choice((4, 4, 6))):
        subject = (noun, second, rng.choice(NOUNS))[index % 3]
        lines.append(
            rng.choice(
                (
                    f"The {subject} {rng.choice(VERBS)} {rng.choice(WHEN)}",
                    f"{rng.choice(WHEN).capitalize()} the {subject} {rng.choice(VERBS)}",
                    f"O {rng.choice(ADJECTIVES)} {subject}, who {rng.choice(VERBS)} {rng.choice(WHEN)}",
                )
            )
        )
    request = rng.choice(
        (
            "Write a poem about a {} and a {}.",
            "Compose a few lines on the {} and the {}.",
            "Give me a verse with {} and {}.",
        )
    )
    return (
        request.format(noun, second),
        f"Images: {noun}, {second}. {len(lines)} lines, a calm rhythm.",
        ",\n".join(lines) + ".",
    )


def document(rng: random.Random, key: str) -> Document:
    """A story or poem as plain text (35 %), as a chat answer, or as a chat with a plan in the thinking channel."""
    form = rng.random()
    parts: list[tuple[str, str, str]] = []
    for _ in range(rng.choice((1, 2, 2))):
        if rng.random() < 0.2:
            parts.append(verse(rng))
        else:
            tale = Tale(rng)
            parts.append((tale.request(), tale.plan(), tale.story()))
    if form < 0.35:
        return Document("creative", key, text="\n\n".join(text for _, _, text in parts) + "\n")
    messages: list[Message] = []
    for request, plan, text in parts:
        messages.append({"role": "user", "content": request})
        answer = {"role": "assistant", "content": text}
        messages.append({**answer, "reasoning_content": plan} if form < 0.7 else answer)
    return Document("creative", key, messages=tuple(messages))
