"""Measure an exported folder with stock transformers: held-out perplexity a class, routing, answers.

`python -m demo.train.measure demo/moe --corpus demo/corpus/heldout.jsonl --out results.json`, for a mixture of experts
also `--routing demo/moe-routing.json`.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo.train.document import CLASSES
from demo.train.generators import mathematics
from transformers import AutoModelForCausalLM, AutoTokenizer

RESAMPLES = 2000
BATCH = 10


@dataclass(slots=True)
class Losses:
    """Summed negative log-likelihood in nats and number of scored tokens, an entry an item."""

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Mean nats a token, perplexity, and a 95 % interval of the perplexity from resampled items."""
        nats, tokens = np.asarray(self.nats), np.asarray(self.tokens)
        draw = np.random.default_rng(0).integers(0, len(nats), (RESAMPLES, len(nats)))
        means = nats[draw].sum(1) / tokens[draw].sum(1)
        low, high = np.exp(np.quantile(means, [0.025, 0.975]))
        mean = float(nats.sum() / tokens.sum())
        return {
            "items": len(nats),
            "tokens": int(tokens.sum()),
            "nats": round(mean, 4),
            "perplexity": round(math.exp(mean), 3),
            "interval": [round(float(low), 3), round(float(high), 3)],
        }


def items(path: Path) -> Iterator[dict[str, Any]]:
    """The items of a corpus file."""
    for line in path.read_bytes().split(b"\n"):
        if line:
            yield json.loads(line)


def token_ids(tokenizer: Any, item: dict[str, Any]) -> list[int]:
    """Token ids with exactly one BOS: chats through the template, text after a literal `<bos>`."""
    if "messages" in item:
        text = tokenizer.apply_chat_template(item["messages"], tokenize=False)
    else:
        text = f"<bos>{item['text']}"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def loaded(folder: Path, dtype: torch.dtype, *, experts: str = "eager", kind: Any = AutoModelForCausalLM) -> Any:
    """The stock model, by default with eager experts; a missing or unexpected tensor is an error."""
    model, info = kind.from_pretrained(folder, dtype=dtype, experts_implementation=experts, output_loading_info=True)
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(f"{folder} does not load cleanly: {wrong}")
    return model.eval()


def batches(ids: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids `[B, S]` padded on the right, and which are real: causal attention keeps the padding out of sight."""
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        tokens = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        for row, item in enumerate(part):
            tokens[row, : len(item)] = torch.tensor(item)
        yield tokens, tokens != 0


@torch.no_grad()
def item_losses(model: Any, ids: list[list[int]], counts: np.ndarray | None = None) -> Losses:
    """Σ -ln p(token | before) in nats over all tokens after the first, an entry an item.

    With `counts` `[L, E]`, every routing decision of a real token is added there.
    """
    found = Losses()
    for tokens, real in batches(ids):
        with nullcontext() if counts is None else counting(model, counts, real):
            logits = model(input_ids=tokens).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # [B, S-1]
        found.nats += (nats.double() * real[:, 1:]).sum(1).tolist()
        found.tokens += real[:, 1:].sum(1).tolist()
    return found


def by_class(
    model: Any, tokenizer: Any, corpus: Path, counts: dict[str, np.ndarray] | None = None
) -> dict[str, Losses]:
    """Losses of the corpus by class; with `counts` (class to `[L, E]`), routing decisions are added there."""
    ids: dict[str, list[list[int]]] = {label: [] for label in CLASSES}
    for item in items(corpus):
        ids[item["class"]].append(token_ids(tokenizer, item))
    return {label: item_losses(model, found, counts[label] if counts else None) for label, found in ids.items()}


@contextmanager
def counting(model: Any, counts: np.ndarray, real: torch.Tensor) -> Iterator[None]:
    """Add the routing decisions of the `real` tokens `[B, S]` to `counts` `[L, E]` while the context is open."""

    def hook(layer: int) -> Any:
        def count(_module: Any, _inputs: Any, output: Any) -> None:
            index = output[2][real.reshape(-1)]
            counts[layer] += np.bincount(index.reshape(-1).numpy(), minlength=counts.shape[1])

        return count

    layers = model.get_decoder().layers
    handles = [layers[i].router.register_forward_hook(hook(i)) for i in range(len(layers))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divergence_bits(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits, `H(m) - (H(p) + H(q)) / 2` with `m = (p + q) / 2`.

    p and q `[E]` sum to 1; 0 when equal, 1 when disjoint.
    """

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log2(p)).sum())

    return entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2


def routing(counts: dict[str, np.ndarray], corpus: str, top_k: int) -> dict[str, Any]:
    """Share of the routing decisions of each class that every expert receives, a layer, with divergences."""
    share = {label: value / value.sum(-1, keepdims=True) for label, value in counts.items()}
    size = share[CLASSES[0]].shape  # [L, E]
    layers = []
    for layer in range(size[0]):
        pairs = {
            f"{a}|{b}": round(divergence_bits(share[a][layer], share[b][layer]), 4)
            for i, a in enumerate(CLASSES)
            for b in CLASSES[i + 1 :]
        }
        layers.append(
            {
                "layer": layer,
                "share": {label: [round(float(x), 5) for x in share[label][layer]] for label in CLASSES},
                "top4": {label: np.argsort(-share[label][layer], kind="stable")[:4].tolist() for label in CLASSES},
                "top4_share": {label: round(float(np.sort(share[label][layer])[-4:].sum()), 4) for label in CLASSES},
                "jensen_shannon_bits": pairs,
                "mean_jensen_shannon_bits": round(float(np.mean(list(pairs.values()))), 4),
            }
        )
    tokens = {label: int(value[0].sum()) // top_k for label, value in counts.items()}
    return {"schema": 1, "corpus": corpus, "tokens": tokens, "experts": size[1], "top_k": top_k, "layers": layers}


@torch.no_grad()
def said(model: Any, tokenizer: Any, questions: list[str], *, thinking: bool) -> list[list[int]]:
    """Greedy answers as token ids without padding, all questions in one batch."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for question in questions
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    stops = [1, tokenizer.convert_tokens_to_ids("<turn|>")]
    output = model.generate(**inputs, max_new_tokens=200, do_sample=False, eos_token_id=stops, pad_token_id=0)
    return [[token for token in row if token] for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def answers(model: Any, tokenizer: Any, *, thinking: bool, count: int) -> dict[str, dict[str, int]]:
    """Fresh arithmetic questions: how many were answered rightly, and how many answers ended with `<turn|>`."""
    stop = tokenizer.convert_tokens_to_ids("<turn|>")
    found = {}
    for name in ("addition", "subtraction", "multiplication", "division", "equation"):
        asked = [getattr(mathematics, name)(random.Random(f"measure:{name}:{index}")) for index in range(count)]
        right = stopped = 0
        for item, ids in zip(
            asked, said(model, tokenizer, [a.question for a in asked], thinking=thinking), strict=True
        ):
            stopped += ids[-1:] == [stop]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            right += text.rstrip(".\n ").split()[-1:] == [item.answer.rstrip(".").split()[-1]]
        found[name] = {"asked": count, "right": right, "stopped": stopped}
    return found


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--routing", type=Path)
    parser.add_argument("--questions", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded(options.folder, dtype)
        name = str(dtype).removeprefix("torch.")
        counts = None
        if options.routing and dtype is torch.float32:
            config = model.config.get_text_config()
            size = (config.num_hidden_layers, config.num_experts)
            counts = {label: np.zeros(size, dtype=np.int64) for label in CLASSES}
        losses = by_class(model, tokenizer, options.corpus, counts)
        results[name] = {label: found.summary() for label, found in losses.items()}
        if counts:
            record = routing(counts, options.corpus.name, config.top_k_experts)
            options.routing.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    model = loaded(options.folder, torch.float32)
    for thinking in (False, True):
        key = "answers_thinking" if thinking else "answers"
        results[key] = answers(model, tokenizer, thinking=thinking, count=options.questions)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
