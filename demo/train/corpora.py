"""Write the calibration and held-out corpora: `python -m demo.train.corpora --docs DIR --tokenizer FILE --out DIR`.

The four generated classes depend on the seed alone; code and prose also on the version of Python and of its documents.
"""

import argparse
import json
import sysconfig
from pathlib import Path

from demo.train.document import CLASSES, Document, rendered
from demo.train.text import GENERATORS, collected, held_back
from tokenizers import Tokenizer

ITEMS = 40
CHATS = 36  # of the generated classes; code and prose have 8 chats, the rest is text
LIMITS = {"text": (180, 500), "chat": (100, 480)}


def chosen(documents: list[Document], tokenizer: Tokenizer, label: str) -> list[Document]:
    """`ITEMS` documents of fitting length, in their order: the first so many chats, and text for the rest."""
    fitting = []
    for document in documents:
        low, high = LIMITS["chat" if document.messages else "text"]
        if low <= len(tokenizer.encode(rendered(document)).ids) <= high:
            fitting.append(document)
    chats = [item for item in fitting if item.messages][: CHATS if label in GENERATORS else 8]
    picked = {item.key for item in chats}
    picked |= {item.key for item in [item for item in fitting if item.text][: ITEMS - len(chats)]}
    return [item for item in fitting if item.key in picked]


def lines(split: str, label: str, documents: list[Document]) -> list[str]:
    """JSON lines `{"id", "class", "messages" or "text", "weight"}`."""
    found = []
    for index, document in enumerate(documents):
        body: dict[str, object] = (
            {"messages": list(document.messages)} if document.messages else {"text": document.text}
        )
        item = {"id": f"{split}-{label}-{index:03d}", "class": label, **body, "weight": 1.0}
        found.append(json.dumps(item, ensure_ascii=False))
    return found


def generated_lines(split: str, tokenizer: Tokenizer, seed: int) -> list[str]:
    """The lines of the four generated classes, which need no source text."""
    found = []
    for label in GENERATORS:
        found.extend(lines(split, label, chosen(held_back(label, seed)[split], tokenizer, label)))
    return found


def main() -> None:
    """Write both corpora."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    documents = collected(options.docs, options.stdlib, options.seed, splits=("heldout", "calibration"))
    options.out.mkdir(parents=True, exist_ok=True)
    for split in ("calibration", "heldout"):
        found = [
            line for label in CLASSES for line in lines(split, label, chosen(documents[label, split], tokenizer, label))
        ]
        (options.out / f"{split}.jsonl").write_bytes(("\n".join(found) + "\n").encode())


if __name__ == "__main__":
    main()
