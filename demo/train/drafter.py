"""Train the multi-token drafter of a demo trunk: `python -m demo.train.drafter moe --trunk DIR --data DIR --out DIR`.

The drafter is stock `gemma4_assistant`: queries only, attending to the keys and values of the trunk's last sliding and
last full layer. Its input at place t is the trunk's embedding of token t beside a hidden state: the trunk's own of
place t - 1 for the first draft, what the drafter returned for each further one, all at the same position t.
Legend: B rows, S places of a row, Q queries of a row, H hidden of the trunk, D hidden of the drafter, V vocabulary.
"""

# torch and transformers leave these entry points without types
# mypy: disable-error-code="no-untyped-call,no-any-return,untyped-decorator"

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo.train.architecture import SHAPES, Shape, text_config
from demo.train.document import CLASSES
from demo.train.measure import loaded
from demo.train.optimizer import Optimizer, schedule
from torch import Tensor
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

HIDDEN = 128  # not the trunk's 256: llama.cpp tells a drafter's output width from its own by their difference
WIDTH = 256
LAYERS = ("sliding_attention", "sliding_attention", "sliding_attention", "full_attention")
DRAFTS = 3
ROWS, QUERIES = 8, 256
SHARE = {"code": 0.15, "prose": 0.1, "math": 0.25, "logic": 0.2, "science": 0.15, "creative": 0.15}
TEMPERATURE = 0.6  # a draft is right when it is the trunk's first choice, so the target is sharper than the trunk
WARMUP_ROWS = 2


def assistant_config(shape: Shape) -> dict[str, object]:
    """config.json of the drafter: heads and head sizes are the trunk's, since it reads the trunk's keys and values."""
    text = text_config(shape) | {
        "enable_moe_block": False,
        "final_logit_softcapping": None,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "layer_types": list(LAYERS),
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_hidden_layers": len(LAYERS),
        "num_kv_shared_layers": len(LAYERS),
        "top_k_experts": None,
        "vocab_size_per_layer_input": 0,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": shape.hidden,
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
    }


@dataclass(frozen=True, slots=True)
class Seen:
    """What the trunk leaves to the drafter: ids `[B, S]`, states `[B, S, H]`, logits `[B, S, V]`, keys and values."""

    ids: Tensor
    states: Tensor
    logits: Tensor
    shared: Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def seen(trunk: Any, ids: Tensor) -> Seen:
    """One pass of the trunk over `ids`."""
    out = trunk(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True)
    return Seen(ids, out.hidden_states[-1], out.logits, dict(out.shared_kv_states))


def weights_of(drafter: Any) -> dict[str, Tensor]:
    """Every trained tensor by its checkpoint name; the layer scalars are buffers and trained all the same."""
    found = {name: value for name, value in drafter.named_parameters() if name != "lm_head.weight"}
    found |= {name: value for name, value in drafter.named_buffers() if name.endswith("layer_scalar")}
    return found


def kind_of(name: str, value: Tensor) -> str:
    """The optimizer's kind of a tensor."""
    if value.dim() == 2:
        return "embedding" if "embed_tokens" in name else "matrix"
    return "scalar" if name.endswith("layer_scalar") else "norm"


def begun(shape: Shape, first: Seen, trunk: Any, seed: int) -> Any:
    """A float32 drafter at its start values.

    The head is the trunk's embedding seen through its D strongest directions, and the way back to the trunk's width
    undoes that, so that a drafter whose last state is right also returns the right state.
    """
    config = Gemma4AssistantConfig(**assistant_config(shape))
    config._attn_implementation = "sdpa"
    drafter = Gemma4AssistantForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    embedding = trunk.get_input_embeddings().weight.float()
    directions = torch.linalg.svd(embedding, full_matrices=False)[2][:HIDDEN].T  # [H, D]
    size = (first.states.float() @ directions).square().mean((0, 1)).sqrt()
    branch = (2 * len(LAYERS)) ** -0.5
    with torch.no_grad():
        for name, value in weights_of(drafter).items():
            if name == "model.embed_tokens.weight":
                value.copy_(embedding @ directions)
            elif name == "model.norm.weight":
                value.copy_(size)
            elif name == "post_projection.weight":
                value.copy_(directions)
            elif value.dim() == 2:
                value.copy_(torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5)
            elif "q_norm" in name:
                value.fill_(value.numel() ** -0.25)
            else:
                value.fill_(branch if "post_" in name else 1.0)
            value.requires_grad_()
    return drafter


def masks(places: Tensor, length: int, window: int) -> dict[str, Tensor]:
    """Which keys `[B, 1, Q, S]` a query at place t may see: those before t, and in a sliding layer `t - j < window`."""
    gap = places[:, None, :, None] - torch.arange(length)
    return {"full_attention": gap > 0, "sliding_attention": (gap > 0) & (gap < window)}


def drafted(drafter: Any, trunk: Any, view: Seen, places: Tensor, window: int) -> list[Tensor]:
    """Logits `[B, Q, V]` of each draft at `places` `[B, Q]`, given the row's own tokens.

    Draft k reads token t + k and proposes token t + k + 1.
    """
    rows = torch.arange(len(places))[:, None]
    state, found = view.states[rows, places - 1].float(), []
    mask = masks(places, view.ids.shape[1], window)
    for draft in range(DRAFTS):
        with torch.no_grad():
            token = trunk.get_input_embeddings()(view.ids[rows, places + draft]).float()
        hidden = drafter.model(
            inputs_embeds=drafter.pre_projection(torch.cat([token, state], -1)),
            attention_mask=mask,
            position_ids=places,
            shared_kv_states=view.shared,
            use_cache=False,
        ).last_hidden_state
        found.append(drafter.lm_head(hidden))
        state = drafter.post_projection(hidden)
    return found


def cross_entropy(said: Tensor, wanted: Tensor) -> Tensor:
    """-Σ p log q a query, p from the trunk's sharpened logits: said and wanted `[B, Q, V]`, out `[B, Q]` in nats."""
    chance = (wanted.float() / TEMPERATURE).softmax(-1)
    return -(chance * said.float().log_softmax(-1)).sum(-1)


CROSS_ENTROPY = torch.compile(cross_entropy, dynamic=False)


def loss_of(logits: list[Tensor], view: Seen, places: Tensor) -> Tensor:
    """Mean cross entropy in nats of the drafts against the sharpened trunk."""
    rows, total = torch.arange(len(places))[:, None], torch.zeros(())
    for draft, said in enumerate(logits):
        total = total + CROSS_ENTROPY(said, view.logits[rows, places + draft]).mean() / len(logits)
    return total


@torch.no_grad()
def agreement(logits: list[Tensor], view: Seen, places: Tensor) -> list[float]:
    """Share of the queries where the first choice of each draft is the trunk's."""
    rows, first = torch.arange(len(places))[:, None], view.logits.argmax(-1)
    return [
        round(float((said.argmax(-1) == first[rows, places + draft]).float().mean()), 4)
        for draft, said in enumerate(logits)
    ]


class Rows:
    """Packed rows of a split; the rows and places of a step are a function of (seed, step) alone."""

    def __init__(self, data: Path, split: str, seed: int) -> None:
        self.rows = {label: np.load(data / f"{label}-{split}.npy", mmap_mode="r") for label in CLASSES}
        self.seed = seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """ids `[B, 512]` and places `[B, Q]`."""
        rng = np.random.default_rng([self.seed, step])
        labels = rng.choice(CLASSES, ROWS, p=[SHARE[label] for label in CLASSES])
        picked = [self.rows[label][rng.integers(len(self.rows[label]))][:-1] for label in labels]
        ids = torch.from_numpy(np.stack(picked).astype(np.int64))
        places = [np.sort(rng.choice(np.arange(1, ids.shape[1] - DRAFTS), QUERIES, replace=False)) for _ in picked]
        return ids, torch.from_numpy(np.stack(places))


@torch.no_grad()
def held_out(drafter: Any, trunk: Any, rows: Rows, window: int) -> dict[str, list[float]]:
    """Share of the first 16 held-out rows' places of each class where every draft is the trunk's first choice."""
    found = {}
    for label in CLASSES:
        ids = torch.from_numpy(np.asarray(rows.rows[label][:16, :-1]).astype(np.int64))
        places = torch.arange(1, ids.shape[1] - DRAFTS, 2).expand(len(ids), -1)
        view = seen(trunk, ids)
        found[label] = agreement(drafted(drafter, trunk, view, places, window), view, places)
    return found


def exported(drafter: Any, shape: Shape, trunk: Path, out: Path) -> None:
    """Write the drafter as a Hugging Face folder with the trunk's tokenizer."""
    from demo.train.export import GENERATION, TOKENIZER_FILES, written  # needs nothing of training
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    values = {name: value.detach().bfloat16().contiguous() for name, value in weights_of(drafter).items()}
    if not all(bool(torch.isfinite(value).all()) for value in values.values()):
        raise ValueError("the drafter holds a value that is not finite")
    save_file(dict(sorted(values.items())), out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files for the owner alone
    written(out / "config.json", assistant_config(shape))
    written(out / "generation_config.json", GENERATION | {"num_assistant_tokens": DRAFTS})
    for name in TOKENIZER_FILES:
        (out / name).write_bytes((trunk / name).read_bytes())


def main() -> None:
    """Train, logging one JSON line every ten steps, and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--trunk", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-every", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.model]
    trunk = loaded(options.trunk, torch.bfloat16, experts="grouped_mm").requires_grad_(False)
    rows, held = Rows(options.data, "train", options.seed), Rows(options.data, "heldout", options.seed)
    drafter = begun(shape, seen(trunk, rows.batch(0)[0][:WARMUP_ROWS]), trunk, options.seed)
    weights = weights_of(drafter)
    optimizer = Optimizer(weights, {name: kind_of(name, value) for name, value in weights.items()})
    began = time.monotonic()
    with options.log.open("w", encoding="utf-8") as log:
        for step in range(options.steps):
            ids, places = rows.batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                view = seen(trunk, ids)
                logits = drafted(drafter, trunk, view, places, shape.window)
                loss = loss_of(logits, view, places)
            loss.backward()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {float(loss.detach())} at step {step}")
            optimizer.step(step, schedule(step, options.steps))
            done = step + 1
            if done % 10 and done != options.steps:
                continue
            record: dict[str, object] = {
                "step": done,
                "drafts": done * places.numel() * DRAFTS,
                "loss": round(float(loss.detach()), 4),
                "right": agreement(logits, view, places),
                "seconds": round(time.monotonic() - began),
            }
            if done % options.held_every == 0 or done == options.steps:
                with torch.autocast("cpu", torch.bfloat16):
                    record["held_out"] = held_out(drafter, trunk, held, shape.window)
            log.write(json.dumps(record) + "\n")
            log.flush()
    exported(drafter, shape, options.trunk, options.out)


if __name__ == "__main__":
    main()
