"""The `vllm serve` command of an NVFP4 folder, from its config.json and headers alone, and what runs it.

Source of names and rules: vLLM 0.33.0 (engine/arg_utils.py; reasoning, tool_parsers: `gemma4`; kernels/linear/nvfp4:
is_supported; marlin_utils_fp4: compute capability 7.5; v1/attention/backends/triton_attn.py: an FP8 cache wants 8.9;
utils/torch_utils.py: `auto` finds the cache of modelopt's layout only). vLLM 0.28.0 is the first that loads Gemma 4
beside transformers 5.15 or newer. vLLM #39595, #42516: experts of 704 split over two cards fail in several kernels.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.checkpoint import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.nvfp4.choices import Layout, Scheme
from gemcut.nvfp4.layout import Told, read_config
from gemcut.types import Json

MINIMUM_VLLM = "0.28.0"
CONTEXT = 32768  # tokens, where the config allows more: a cache of the whole context rarely fits beside the weights
DRAFT_TOKENS = 2
IMAGES = 2
_BLOCK = 16  # columns of one scale: no card may have a part of a block
_TILE = 64  # columns that kernels for experts take at a time


@dataclass(frozen=True, slots=True)
class ServeWords:
    """What a folder does not say.

    model: as vLLM should find it; the folder's name by default.   name: what clients ask for; the folder's name.
    context: tokens; the config's limit, 32768 at most, by default.   drafter: a checkpoint that predicts more tokens.
    images: per request; 0 serves text alone.   cards: that share each matrix.
    """

    model: str = ""
    name: str = ""
    context: int | None = None
    drafter: str | None = None
    draft_tokens: int = DRAFT_TOKENS
    images: int = IMAGES
    cards: int = 1


@dataclass(frozen=True, slots=True)
class Serving:
    """command: argv.   line: the same for a shell, quoted.   needs: vLLM's version and the hardware, in sentences."""

    command: tuple[str, ...]
    line: str
    vllm: str
    scheme: Scheme
    layout: Layout
    needs: tuple[str, ...]


def serving(folder: Checkpoint, words: ServeWords | None = None) -> Serving:
    """How vLLM serves an NVFP4 folder.

    Raises:
        CheckpointError: config.json does not speak of NVFP4, or lacks a size.
        UsageError: a number that cannot be; matrices that do not split evenly over so many cards; a context beyond the
            model's.
    """
    words = words or ServeWords()
    told = read_config(folder.config, folder.name)
    text = folder.text_config
    for what, number, least in (
        ("cards", words.cards, 1), ("draft tokens", words.draft_tokens, 1), ("images", words.images, 0),
    ):  # fmt: skip
        if number < least:
            raise UsageError(f"too few {what}", got=number, wanted=f"at least {least}")
    flags = ["--served-model-name", words.name or folder.name]
    flags += ["--max-model-len", str(_context(text, words.context, folder.name))]
    if told.cache:
        flags += ["--kv-cache-dtype", "fp8"]
    experts = _experts(folder)
    flags += _split(text, words.cards, experts, folder.name)
    flags += _media(folder, words.images)
    said = folder.family.serving
    flags += ["--reasoning-parser", said.reasoning_parser, "--tool-call-parser", said.tool_parser]
    flags += ["--enable-auto-tool-choice"]
    if words.drafter is not None:
        draft: dict[str, Json] = {
            "method": "mtp", "model": words.drafter, "num_speculative_tokens": words.draft_tokens
        }  # fmt: skip
        flags += ["--speculative-config", _json(draft)]
    model = words.model or folder.name
    command = ("vllm", "serve", model, *flags)
    return Serving(command, shell_line(command), MINIMUM_VLLM, told.scheme, told.layout, _needs(told, experts, words))


def shell_line(command: tuple[str, ...]) -> str:
    """One option a line, quoted for a POSIX shell."""
    lines = [shlex.join(command[:3])]
    for word in command[3:]:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def _context(text: Mapping[str, Json], asked: int | None, where: str) -> int:
    limit = _number(text, "max_position_embeddings", where)
    if asked is not None and not 0 < asked <= limit:
        raise UsageError("no context of that length", where=where, got=asked, wanted=f"1 to {limit} tokens")
    return asked or min(CONTEXT, limit)


def _media(folder: Checkpoint, images: int) -> list[str]:
    """Nothing for a text model. A wrapper without its tower is served as the text model in it; vLLM wants the tower."""
    if "vision_config" not in folder.config:
        return []
    if folder.config["vision_config"] is None or not _has(folder, "vision"):
        return ["--hf-overrides", _json({"architectures": [folder.family.serving.text_model]})]
    return ["--limit-mm-per-prompt", _json({"image": images})] if images else ["--language-model-only"]


def _has(folder: Checkpoint, part: str, dtype: str | None = None) -> bool:
    """Whether some tensor of a part is there, of that dtype."""
    component = folder.family.component
    return any(component(name) == part and dtype in (None, ref.dtype) for name, ref in folder.tensors.items())


def _json(value: Mapping[str, Json]) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _experts(folder: Checkpoint) -> int:
    """Columns of one expert, where experts have four bits; else 0."""
    return _number(folder.text_config, "moe_intermediate_size", folder.name) if _has(folder, "experts", "U8") else 0


def _split(text: Mapping[str, Json], cards: int, experts: int, where: str) -> list[str]:
    """Tensor parallelism: heads and blocks of 16 come out whole; experts stay whole where kernels want tiles."""
    if cards == 1:
        return []
    heads = _number(text, "num_attention_heads", where)
    if heads % cards:
        raise UsageError("attention heads do not split over so many cards", where=where, got=cards, wanted=_of(heads))
    for key in ("num_key_value_heads", "num_global_key_value_heads"):
        count = text.get(key)
        if isinstance(count, int) and count % cards and cards % count:
            raise UsageError(f"{key} does not split over so many cards", where=where, got=cards, wanted=_of(count))
    wide = _number(text, "intermediate_size", where)
    if wide % (cards * _BLOCK):
        raise UsageError(
            "the MLP does not split into whole blocks of 16", where=where, got=f"{wide} columns over {cards} cards"
        )
    flags = ["--tensor-parallel-size", str(cards)]
    if experts % (cards * _TILE):
        flags.append("--enable-expert-parallel")  # whole experts on each card
    return flags


def _of(count: int) -> str:
    return "one of " + ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def _needs(told: Told, experts: int, words: ServeWords) -> tuple[str, ...]:
    out = [f"vLLM {MINIMUM_VLLM} or newer."]
    if told.scheme == "NVFP4":
        out.append(
            "W4A4 runs as such on Blackwell alone (compute capability 10.x, 12.x: B200, B300, RTX 50, RTX PRO, GB10). "
            "From 7.5 to 9.0 (Turing, Ampere, Ada, Hopper) vLLM falls back to weight-only Marlin: the same memory, "
            "activations and arithmetic in 16 bits. AMD cards emulate it, slowly. The log names the kernel."
        )
    else:
        out.append(
            "Weights alone have four bits: NVIDIA cards from compute capability 7.5 on unpack them inside the kernel "
            "(Marlin; FlashInfer on 10.x) and multiply in 16 bits."
        )
    if told.cache:
        out.append("The FP8 cache wants compute capability 8.9 or newer (Ada, Hopper, Blackwell).")
    if experts % (2 * _TILE):
        out.append(
            f"Experts of {experts} columns do not split into tiles of {_TILE} over two cards: one card, or "
            "--enable-expert-parallel."
        )
    if words.drafter is not None:
        out.append("The drafter runs by the method mtp; without that word vLLM takes it for a model of its own.")
    return tuple(out)


def _number(text: Mapping[str, Json], key: str, where: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json lacks {key}", where=where, got=value, wanted="a number above 0")
    return value
