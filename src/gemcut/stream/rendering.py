"""From messages to token ids: the checkpoint's own chat template, its own tokenizer, exactly one BOS.

The tokenizer call of Gemma 4 adds no BOS and its chat template writes a literal `<bos>`, so both "none" and "two" are
one careless flag away. Ids are made here once and passed on explicitly; nothing later tokenises again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from gemcut.errors import CheckpointError, UsageError
from gemcut.store import canonical_json, fingerprint, read_json
from gemcut.stream.corpus_file import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
# Parts of tokenizer.json that do not change which ids a text becomes when no special tokens are added.
_NOT_IDENTITY = ("truncation", "padding", "post_processor", "decoder", "version")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A checkpoint's tokenizer with what a record must say about it.

    bos_id is None for families without a BOS. vocab_size is the model's, from config.json: rows of the embedding,
    not entries of the tokenizer; None where the folder has no config.json.
    """

    inner: PreTrainedTokenizerBase
    bos_id: int | None
    vocab_size: int | None
    template: str | None
    template_hash: str
    hash: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one item, BOS first. `bos` says who put it there; `spliced` counts thinking blocks that we added."""

    ids: list[int]
    bos: str
    spliced: int


def tokenizer_hash(folder: Path) -> str:
    """sha256 of what decides the ids: vocabulary, merges, added tokens, normaliser. Two folders with equal hashes
    give the same ids, even where a re-save changed the file's bytes."""
    value = read_json(folder / "tokenizer.json", "tokenizer.json")
    return fingerprint({key: part for key, part in value.items() if key not in _NOT_IDENTITY})


def vocab_size_of(folder: Path) -> int | None:
    """The model's vocabulary from config.json, flat or under text_config; None without a config.json."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json", "config.json")
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        size = part.get("vocab_size")
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None


def open_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder, from that folder alone.

    Raises:
        CheckpointError: tokenizer.json is missing or cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            hint="copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the original model",
        )
    try:
        inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a foreign library reading foreign files: every failure means the same to the user
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {reason.split(chr(10))[0]}", where=str(folder)
        ) from error
    template = inner.chat_template if isinstance(inner.chat_template, str) else None
    return Tokenizer(
        inner=inner,
        bos_id=inner.bos_token_id,
        vocab_size=vocab_size_of(folder),
        template=template,
        template_hash=hashlib.sha256(template.encode()).hexdigest() if template is not None else "none",
        hash=tokenizer_hash(folder),
    )


def render_text(tokenizer: Tokenizer, text: str, where: str) -> Rendered:
    """BOS and the text. A literal BOS marker at the text's start counts as the one BOS."""
    return _with_bos(tokenizer, _encode(tokenizer, text), "text", where, spliced=0)


def render_messages(tokenizer: Tokenizer, messages: Sequence[Message], where: str) -> Rendered:
    """Prompt, reasoning and answer as the model's own template writes them (teacher forcing).

    Published Gemma 4 templates drop the reasoning of every answer without tool calls, which would silently turn
    "prompt + reasoning + answer" into "prompt + answer". Each reasoning is therefore probed with a marker; where the
    template drops it, the thinking channel is put before the answer in the form that the model itself generates.

    Raises:
        CheckpointError: the folder has no chat template, or no thinking channel to hold a dropped reasoning.
        UsageError: the template refuses the messages, or BOS stands inside the text.
    """
    if tokenizer.template is None:
        raise CheckpointError(
            "the checkpoint has no chat template, and the corpus has messages",
            where=where,
            hint="add chat_template.jinja to the checkpoint, or give the items as text",
        )
    turns: list[dict[str, str]] = [m.model_dump(exclude_none=True) for m in messages]
    thinks = [i for i, m in enumerate(messages) if m.reasoning_content and m.reasoning_content.strip()]
    if not thinks:
        text = _apply(tokenizer, turns, thinking=False, where=where)
        return _with_bos(tokenizer, _encode(tokenizer, text), "template", where, spliced=0)
    nonce = hashlib.sha256(canonical_json({"turns": json.dumps(turns)})).hexdigest()[:16]
    marks = {i: f"GEMCUT{nonce}N{i}E" for i in thinks}
    probe = [turn | {"reasoning_content": marks[i]} if i in marks else turn for i, turn in enumerate(turns)]
    shown = _apply(tokenizer, probe, thinking=True, where=where)
    lost = [i for i in thinks if marks[i] not in shown]
    for i in lost:
        content = marks[i] + turns[i]["content"].lstrip()
        turns[i] = {"role": turns[i]["role"], "content": content}
    text = _apply(tokenizer, turns, thinking=True, where=where)
    for i in lost:
        text = _splice(tokenizer, text, marks[i], messages[i].reasoning_content or "", where)
    return _with_bos(tokenizer, _encode(tokenizer, text), "template", where, spliced=len(lost))


def render_question(tokenizer: Tokenizer, question: str, where: str, *, thinking: bool) -> Rendered:
    """One user turn and the opening of the model's, as the template writes them for generation.

    Raises:
        CheckpointError: the folder has no chat template.
        UsageError: the template refuses the message, or BOS stands inside the text.
    """
    if tokenizer.template is None:
        raise CheckpointError("the checkpoint has no chat template", where=where, hint="add chat_template.jinja")
    turns = [{"role": "user", "content": question}]
    text = _apply(tokenizer, turns, thinking=thinking, where=where, answer=True)
    return _with_bos(tokenizer, _encode(tokenizer, text), "template", where, spliced=0)


def _splice(tokenizer: Tokenizer, text: str, mark: str, reasoning: str, where: str) -> str:
    vocab = tokenizer.inner.get_vocab()
    if CHANNEL_OPEN not in vocab or CHANNEL_CLOSE not in vocab or text.count(mark) != 1:
        raise CheckpointError(
            "the chat template drops the reasoning, and the tokenizer has no thinking channel",
            where=where,
            hint="remove reasoning_content from the corpus, or use a template that renders it",
        )
    return text.replace(mark, f"{CHANNEL_OPEN}thought\n{reasoning.strip()}\n{CHANNEL_CLOSE}")


def _apply(
    tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]], *, thinking: bool, where: str, answer: bool = False
) -> str:
    try:
        text = tokenizer.inner.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answer, enable_thinking=thinking
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UsageError(f"the chat template refuses the messages: {error}", where=where) from error
    return str(text)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.inner(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _with_bos(tokenizer: Tokenizer, ids: list[int], writer: str, where: str, *, spliced: int) -> Rendered:
    """Exactly one BOS, first; and every id inside the model's vocabulary."""
    bos = tokenizer.bos_id
    by = "none"
    if bos is not None:
        if ids and ids[0] == bos:
            by = writer
        else:
            ids, by = [bos, *ids], "added"
        if ids.count(bos) != 1:
            raise UsageError(
                "BOS stands inside an item",
                where=where,
                got=f"{ids.count(bos)} BOS tokens",
                wanted="exactly one, at the start",
                hint=f"remove the literal {tokenizer.inner.bos_token!r} from the text",
            )
    if tokenizer.vocab_size is not None and ids and max(ids) >= tokenizer.vocab_size:
        raise CheckpointError(
            "the tokenizer makes ids that the model does not have",
            where=where,
            got=f"id {max(ids)}",
            wanted=f"below vocab_size {tokenizer.vocab_size}",
            hint="tokenizer.json and config.json are of different models",
        )
    return Rendered(ids, by, spliced)
