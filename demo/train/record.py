"""Write SHA256SUMS and the tables of README.md from the measured results: `python -m demo.train.record demo`."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from demo.train.document import CLASSES

FOLDERS = ("moe", "dense", "moe-drafter", "dense-drafter", "moe-vision", "corpus", "results")
FILES = ("moe-routing.json",)
BEGIN, END = "<!-- tables: written by demo.train.record -->", "<!-- end of tables -->"
NAMES = {"moe": "mixture of experts", "dense": "dense"}


def hashes(demo: Path) -> dict[str, str]:
    """sha256 of every committed artefact, by its path below `demo`."""
    paths = [demo / name for name in FILES]
    for folder in FOLDERS:
        paths.extend(path for path in (demo / folder).iterdir() if path.is_file())
    return {path.relative_to(demo).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def loss_table(demo: Path) -> str:
    """Held-out nats and perplexity a class and model, float32, with the interval and the bfloat16 difference."""
    lines = [
        "| model | class | tokens | nats a token | perplexity | 95 % interval | bfloat16 − float32, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, name in NAMES.items():
        results = _read(demo / "results" / f"{model}.json")
        for label in CLASSES:
            full, half = results["float32"][label], results["bfloat16"][label]
            low, high = full["interval"]
            lines.append(
                f"| {name} | {label} | {full['tokens']} | {full['nats']:.3f} | {full['perplexity']:.2f} | "
                f"{low:.2f} to {high:.2f} | {half['nats'] - full['nats']:+.4f} |"
            )
    return "\n".join(lines)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion: `(p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`, z = 1.96."""
    z, p = 1.96, right / asked
    middle = p + z * z / (2 * asked)
    spread = z * (p * (1 - p) / asked + z * z / (4 * asked * asked)) ** 0.5
    scale = 1 + z * z / asked
    return (middle - spread) / scale, (middle + spread) / scale


def answer_table(demo: Path) -> str:
    """Greedy answers to fresh questions."""
    lines = [
        "| model | question | thinking | asked | right | 95 % interval | ended with `<turn\\|>` |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, name in NAMES.items():
        results = _read(demo / "results" / f"{model}.json")
        for key, thinking in (("answers", "no"), ("answers_thinking", "yes")):
            for kind, row in results[key].items():
                low, high = wilson(row["right"], row["asked"])
                counts = f"{row['asked']} | {row['right']} | {low:.2f} to {high:.2f} | {row['stopped']}"
                lines.append(f"| {name} | {kind} | {thinking} | {counts} |")
    return "\n".join(lines)


def curve_table(demo: Path) -> str:
    """Training loss (one batch) and held-out losses along the training, in nats a token."""
    lines = [
        "| model | step | tokens | training loss | " + " | ".join(CLASSES) + " |",
        "|---|---|---|---|" + "---|" * len(CLASSES),
    ]
    for model, name in NAMES.items():
        for line in (demo / "results" / f"{model}-log.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "held_out" in record:
                values = " | ".join(f"{record['held_out'][label]:.3f}" for label in CLASSES)
                lines.append(f"| {name} | {record['step']} | {record['tokens']} | {record['loss']:.3f} | {values} |")
    return "\n".join(lines)


def routing_tables(demo: Path) -> str:
    """Divergence between classes a layer, and the four most used experts of each class."""
    record = _read(demo / "moe-routing.json")
    lines = [
        "| layer | mean divergence, bits | least | most | busiest four of 32 a class: share of decisions |",
        "|---|---|---|---|---|",
    ]
    for layer in record["layers"]:
        pairs = layer["jensen_shannon_bits"]
        near, far = min(pairs, key=pairs.__getitem__), max(pairs, key=pairs.__getitem__)
        shares = ", ".join(f"{label} {layer['top4_share'][label]:.2f}" for label in CLASSES)
        near_name, far_name = near.replace("|", "/"), far.replace("|", "/")
        lines.append(
            f"| {layer['layer']} | {layer['mean_jensen_shannon_bits']:.3f} | {pairs[near]:.3f} {near_name} | "
            f"{pairs[far]:.3f} {far_name} | {shares} |"
        )
    lines += ["", "| layer | " + " | ".join(CLASSES) + " |", "|---|" + "---|" * len(CLASSES)]
    for layer in record["layers"]:
        cells = " | ".join(", ".join(map(str, layer["top4"][label])) for label in CLASSES)
        lines.append(f"| {layer['layer']} | {cells} |")
    return "\n".join(lines)


def rate(row: dict[str, Any]) -> str:
    """A measured share with its interval."""
    low, high = row["interval"]
    return f"{row['rate']:.3f} ({low:.3f} to {high:.3f})"


def drafter_tables(demo: Path) -> str:
    """Accepted drafts by number of drafts a round and by class, and how the drafters learned."""
    lines = [
        "| trunk | drafts a round | answers | equal to plain greedy | drafted | accepted | share | of first drafts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chats = [label for label in CLASSES if label != "prose"]  # prose is text without turns
    classes = ["| trunk | " + " | ".join(chats) + " |", "|---|" + "---|" * len(chats)]
    curve = [
        "| trunk | step | drafts | training loss | " + " | ".join(CLASSES) + " |",
        "|---|---|---|---|" + "---|" * len(CLASSES),
    ]
    for model, name in NAMES.items():
        results = _read(demo / "results" / f"{model}-drafter.json")["drafts"]
        for drafts, row in results.items():
            every = row["overall"]
            counts = f"{row['prompts']} | {row['equal_to_greedy']} | {every['drafted']} | {every['accepted']}"
            lines.append(f"| {name} | {drafts} | {counts} | {rate(every)} | {rate(row['by_place'][0])} |")
        classes.append(f"| {name} | " + " | ".join(rate(results["3"]["by_class"][label]) for label in chats) + " |")
        for line in (demo / "results" / f"{model}-drafter-log.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "held_out" in record:
                values = " | ".join(", ".join(f"{x:.2f}" for x in record["held_out"][label]) for label in CLASSES)
                curve.append(f"| {name} | {record['step']} | {record['drafts']} | {record['loss']:.3f} | {values} |")
    return "\n\n".join(
        (
            "\n".join(lines),
            "Three drafts a round, by class:",
            "\n".join(classes),
            "Share of held-out places where each of three drafts is the trunk's first choice, given the text:",
            "\n".join(curve),
        )
    )


def vision_tables(demo: Path) -> str:
    """Answers about pictures never seen, and how the tower learned."""
    lines = ["| question | asked | right | 95 % interval | chance |", "|---|---|---|---|---|"]
    for kind, row in _read(demo / "results" / "moe-vision.json")["kinds"].items():
        low, high = row["interval"]
        lines.append(f"| {kind} | {row['asked']} | {row['right']} | {low:.3f} to {high:.3f} | {row['chance']:.3f} |")
    curve = ["| stage | step | training loss | right |", "|---|---|---|---|"]
    for line in (demo / "results" / "moe-vision-log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["step"] % 60 == 0 or record["step"] in (180, 220):
            right = record["right"]
            shown = ", ".join(f"{x:.2f}" for x in (right if isinstance(right, list) else [right]))
            curve.append(f"| {record['stage']} | {record['step']} | {record['loss']:.3f} | {shown} |")
    said = (
        "Right, while it learns to see: colour and shape of the figure in its cell, then colour, shape and number of "
        "the picture in every cell; while it learns to tell: tokens of the answers. One batch each."
    )
    return "\n\n".join(("\n".join(lines), said, "\n".join(curve)))


def served_tables(demo: Path) -> str:
    """What llama.cpp's server says of files of `gemcut gguf`."""
    lines = [
        "| trunk | drafter | answers | equal to plain greedy | looping | drafted | accepted | share | without loops |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in NAMES:
        row = _read(demo / "results" / f"{model}-drafter-served.json")
        trunk, drafter = row["files"]
        every = row["overall"]
        counts = f"{row['prompts']} | {row['equal_to_greedy']} | {row['loops']}"
        counts += f" | {every['drafted']} | {every['accepted']}"
        lines.append(f"| `{trunk}` | `{drafter}` | {counts} | {rate(every)} | {rate(row['unlooped'])} |")
    record = _read(demo / "results" / "moe-vision-served.json")
    trunk, mmproj = record["files"]
    pictures = [f"| `{trunk}` with `{mmproj}` | asked | right | 95 % interval |", "|---|---|---|---|"]
    for kind, row in record["kinds"].items():
        low, high = row["interval"]
        pictures.append(f"| {kind} | {row['asked']} | {row['right']} | {low:.3f} to {high:.3f} |")
    return "\n\n".join(("\n".join(lines), "\n".join(pictures)))


def tables(demo: Path) -> str:
    """All tables under their headings."""
    parts = (
        ("Held-out loss", loss_table(demo)),
        ("Answers", answer_table(demo)),
        ("Routing", routing_tables(demo)),
        ("Curve", curve_table(demo)),
        ("Drafters", drafter_tables(demo)),
        ("Pictures", vision_tables(demo)),
        ("In llama.cpp's server", served_tables(demo)),
        ("Hashes", "```\n" + "\n".join(f"{digest}  {name}" for name, digest in hashes(demo).items()) + "\n```"),
    )
    return "\n\n".join(f"### {title}\n\n{body}" for title, body in parts)


def main() -> None:
    """Update README.md between its markers, and SHA256SUMS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args().demo
    readme = (demo / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    (demo / "README.md").write_text(f"{before}{BEGIN}\n\n{tables(demo)}\n\n{END}{after}", encoding="utf-8")
    (demo / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in hashes(demo).items()))


if __name__ == "__main__":
    main()
