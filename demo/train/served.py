"""Measure exported files with llama.cpp's server from the pinned wheel, one thread, greedy.

`python -m demo.train.served drafts TRUNK.gguf DRAFTER.gguf --corpus demo/corpus/heldout.jsonl --out results.json`
`python -m demo.train.served pictures TRUNK.gguf MMPROJ.gguf --out results.json`

The questions are those of `acceptance` and `answers`, which ask stock transformers.
"""

# xllamacpp leaves its parameters without types
# mypy: disable-error-code="attr-defined"

import argparse
import base64
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from demo.train import acceptance, answers
from demo.train.generators.pictures import asked, drawn
from demo.train.record import wilson

from gemcut.canary.detect import loop_period

DRAFTS = 3
CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, thought or said, its token ids, by how many nats each was the likeliest, and what was drafted."""

    said: str
    ids: list[int]
    margins: list[float]
    drafted: int
    accepted: int


class Server:
    """One slot, one thread, no cache of prompts: an answer depends on its question alone."""

    def __init__(self, model: Path, *, drafter: Path | None = None, mmproj: Path | None = None) -> None:
        params: Any = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(model), CONTEXT, 1
        params.warmup, params.use_jinja, params.cache_prompt, params.cache_ram_mib = False, True, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        if drafter is not None:
            draft = params.speculative.draft
            draft.mparams.path, draft.n_max = str(drafter), DRAFTS
            draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
            params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        if mmproj is not None:
            params.mmproj.path, params.mmproj_use_gpu = str(mmproj), False
        self._server: Any = xllamacpp.Server(params)

    def reply(self, messages: list[Any], tokens: int, thinking: bool = False) -> Reply:
        """The greedy answer to a conversation."""
        question = {
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "cache_prompt": False,
            "logprobs": True,
            "top_logprobs": 2,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        found = self._server.handle_chat_completions(question)
        found = found if isinstance(found, dict) else json.loads(found)
        if "choices" not in found:
            raise RuntimeError(f"the server refuses: {found}")
        (choice,), timings = found["choices"], found["timings"]
        tokens_said = choice["logprobs"]["content"]
        best = [[one["logprob"] for one in token["top_logprobs"]] for token in tokens_said]
        return Reply(
            "".join(choice["message"].get(part) or "" for part in ("reasoning_content", "content")).strip(),
            [token["id"] for token in tokens_said],
            [two[0] - two[1] if len(two) == 2 else 0.0 for two in best],  # accepted drafts come without
            timings.get("draft_n", 0),
            timings.get("draft_n_accepted", 0),
        )


def parted(plain: Reply, helped: Reply) -> dict[str, object] | None:
    """Where the two answers part, and by how many nats the plain one preferred its token there; None where equal."""
    for place, (wanted, found) in enumerate(zip(plain.ids, helped.ids, strict=False)):
        if wanted != found:
            return {"place": place, "margin": round(plain.margins[place], 4)}
    if len(plain.ids) == len(helped.ids):
        return None
    return {"place": min(len(plain.ids), len(helped.ids)), "margin": float("inf")}  # one ended without its stop


def drafts(trunk: Path, drafter: Path, corpus: Path, per_class: int) -> dict[str, object]:
    """Answers with the drafter against answers without it, and the share of accepted drafts.

    What repeats itself is easily drafted: answers that end in a loop are counted, and the share is said without them.
    """
    plain, helped = Server(trunk), Server(trunk, drafter=drafter)
    rounds: dict[str, list[acceptance.Rounds]] = {}
    unlooped, differ = [], []
    for label, chats in acceptance.chats(corpus, per_class).items():
        for number, (messages, thinking) in enumerate(chats):
            wanted = plain.reply(messages, acceptance.NEW_TOKENS, thinking)
            found = helped.reply(messages, acceptance.NEW_TOKENS, thinking)
            rounds.setdefault(label, []).append(acceptance.Rounds([found.drafted], [found.accepted]))
            if not loop_period(found.ids):
                unlooped.append(rounds[label][-1])
            where = parted(wanted, found)
            if where is not None:
                differ.append({"chat": f"{label} {number}", **where})
    every = [one for some in rounds.values() for one in some]
    return {
        "prompts": len(every),
        "equal_to_greedy": len(every) - len(differ),
        "loops": len(every) - len(unlooped),
        "drafts": DRAFTS,
        "overall": acceptance.rate(every),
        "unlooped": acceptance.rate(unlooped),
        "by_class": {label: acceptance.rate(some) for label, some in rounds.items()},
        "differ": differ,
    }


def png(pixels: np.ndarray) -> bytes:
    """A picture `[height, width, 3]` uint8 as a PNG file."""

    def chunks() -> Iterator[bytes]:
        height, width, _ = pixels.shape
        rows = np.pad(pixels.reshape(height, width * 3), ((0, 0), (1, 0)))  # filter 0 before every row
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows.tobytes())),
            (b"IEND", b""),
        ):
            yield struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks())


def pictures(trunk: Path, mmproj: Path, number: int) -> dict[str, object]:
    """One question of each kind about each picture; an answer is right word for word."""
    server = Server(trunk, mmproj=mmproj)
    right = dict.fromkeys(answers.CHANCE, 0)
    for key in (f"heldout:{index}" for index in range(number)):
        picture = drawn(key)
        url = "data:image/png;base64," + base64.b64encode(png(picture.pixels)).decode()
        for question in asked(key, picture):
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
            found = server.reply([{"role": "user", "content": content}], answers.NEW_TOKENS)
            right[question.kind] += found.said == question.answer
    kinds = {
        kind: {"asked": number, "right": hits, "interval": [round(edge, 4) for edge in wilson(hits, number)]}
        for kind, hits in right.items()
    }
    return {"kinds": kinds}


def main() -> None:
    """Ask and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, beside in (("drafts", "drafter"), ("pictures", "mmproj")):
        verb = verbs.add_parser(name)
        verb.add_argument("trunk", type=Path)
        verb.add_argument(beside, type=Path)
        verb.add_argument("--out", type=Path, required=True)
        if name == "drafts":
            verb.add_argument("--corpus", type=Path, required=True)
            verb.add_argument("--per-class", type=int, default=acceptance.PER_CLASS)
        else:
            verb.add_argument("--pictures", type=int, default=answers.PICTURES)
    options = parser.parse_args()
    if options.verb == "drafts":
        record = drafts(options.trunk, options.drafter, options.corpus, options.per_class)
    else:
        record = pictures(options.trunk, options.mmproj, options.pictures)
    files = [options.trunk.name, (options.drafter if options.verb == "drafts" else options.mmproj).name]
    record = {"files": files, "wheel": f"xllamacpp {xllamacpp.__version__}", **record}
    options.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
