"""The calibration and evaluation corpus: token ids, classes and weights, and what a record must say about them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.store import canonical_json
from gemcut.stream.corpus_file import FORMS, TEXT_CLASS, TextItems, read_entries, read_pieces
from gemcut.stream.rendering import Rendered, Tokenizer, open_tokenizer, render_messages, render_text, tokenizer_hash
from gemcut.types import I64

log = logging.getLogger(__name__)

MAX_TOKENS_PER_ITEM = 4096
MIN_TOKENS = 2  # below that there is no next token to predict


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One item: `ids` int64 [T], BOS first, read-only."""

    id: str
    cls: str
    ids: I64
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Items in file order.

    classes: names in alphabetical order, so that two corpora with the same classes agree whatever comes first.
    hash: sha256 over ids, classes, weights and token ids of the items that are in.
    bos_policy: who wrote the one BOS of each kind of item, for example "chat: template; text: added".
    spliced_items: items whose reasoning the template dropped and which we put into the thinking channel.
    left_out_*: what `max_tokens` left out.
    """

    items: tuple[Row, ...]
    hash: str
    template_hash: str
    tokenizer_hash: str
    bos_policy: str
    max_tokens_per_item: int
    truncated_items: int
    classes: tuple[str, ...]
    reasoning_items: int = 0
    spliced_items: int = 0
    left_out_items: int = 0
    left_out_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.items)

    @property
    def scored_tokens(self) -> int:
        """Next-token positions: one less than the tokens of each item."""
        return self.tokens - len(self.items)


@dataclass(frozen=True, slots=True)
class _Item:
    """A rendered item before the budget is spent. int32 ids: what is left out later should cost little."""

    id: str
    cls: str
    weight: float
    ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    kind: Literal["chat", "text"]
    bos: str
    reasoning: bool
    spliced: bool
    truncated: bool


def load_corpus(
    path: Path,
    tokenizer_folder: Path,
    *,
    max_tokens_per_item: int = MAX_TOKENS_PER_ITEM,
    max_tokens: int | None = None,
    max_items: int | None = None,
    chat_only: bool = False,
    classes: Sequence[str] | None = None,
    on_long: Literal["truncate", "refuse"] = "truncate",
    text_items: TextItems = "blocks",
    raw: bool = False,
) -> Corpus:
    """Read a corpus file and turn it into token ids with the tokenizer and chat template of a checkpoint folder.

    Args:
        path: JSON lines, or `.txt`.
        tokenizer_folder: a checkpoint folder; only its tokenizer files and config.json are read.
        max_tokens_per_item: longer items are cut at the end and counted (`on_long="refuse"`: an error).
        max_tokens: whole items only. The classes, in order of first appearance, take turns, each giving its next item
            in file order; a class stops at its first item that does not fit.
        max_items: at most so many items, in the same turns.
        chat_only: items with messages alone.
        classes: only these classes.
        text_items: `.txt` only. "blocks": one item per blank-line separated block. "chunks": the whole text cut into
            items of `max_tokens_per_item` tokens, each with its own BOS.
        raw: messages become plain text, reasoning and answers joined by blank lines, without the chat template.
    Raises:
        UsageError: see corpus_file; also a class that is not there, a budget that holds no item, an item of fewer than
            two tokens.
        CheckpointError: the tokenizer is missing, has no chat template for messages, or gives ids above the vocabulary.
    """
    path, tokenizer_folder = Path(path), Path(tokenizer_folder)
    if max_tokens_per_item < MIN_TOKENS:
        raise UsageError("max_tokens_per_item is too small", got=max_tokens_per_item, wanted=f"at least {MIN_TOKENS}")
    if not path.exists():
        raise UsageError("there is no corpus file", where=str(path), wanted=FORMS)
    tokenizer = open_tokenizer(tokenizer_folder)
    if path.suffix == ".txt" and text_items == "chunks":
        items = list(_chunks(path, tokenizer, max_tokens_per_item))
        if not items:
            raise UsageError("the corpus is empty or blank", where=path.name)
    else:
        items = list(_items(path, tokenizer, max_tokens_per_item, on_long, raw=raw))
    if classes is not None:
        items = _of_classes(items, classes, path)
    if chat_only:
        items = _chats(items, path)
    limited = max_tokens is not None or max_items is not None
    taken = _within(items, max_tokens, max_items, path) if limited else items
    corpus = _corpus(taken, items, tokenizer, max_tokens_per_item)
    if corpus.truncated_items:
        log.info("%d of %d items were cut to %d tokens", corpus.truncated_items, len(taken), max_tokens_per_item)
    if corpus.spliced_items:
        log.info("%d items: the template drops reasoning; it went into the thinking channel", corpus.spliced_items)
    if corpus.left_out_items:
        log.info("the limits left out %d items (%d tokens)", corpus.left_out_items, corpus.left_out_tokens)
    return corpus


def check_tokenizer(folder: Path, name: str, corpus: Corpus) -> None:
    """The token ids must mean to a model what they meant to the tokenizer that made them.

    Args:
        name: of the model, for the message.
    Raises:
        CheckpointError: the folder's tokenizer is another one.
    """
    found = tokenizer_hash(folder)
    if found != corpus.tokenizer_hash:
        raise CheckpointError(
            "the corpus was tokenised by another tokenizer than the model's",
            where=name,
            got=found[:12],
            wanted=corpus.tokenizer_hash[:12],
            hint="models that are compared need the same token ids",
        )


def _items(
    path: Path, tokenizer: Tokenizer, limit: int, on_long: Literal["truncate", "refuse"], *, raw: bool
) -> Iterator[_Item]:
    for entry in read_entries(path):
        record = entry.record
        where = f"{path.name}, line {entry.line}, item {record.id!r}"
        reasoning = False
        if record.messages is not None and raw:
            parts = [part for m in record.messages for part in (m.reasoning_content, m.content) if part]
            rendered = render_text(tokenizer, "\n\n".join(parts), where)
        elif record.messages is not None:
            rendered = render_messages(tokenizer, record.messages, where)
            reasoning = any(m.reasoning_content for m in record.messages)
        else:
            rendered = render_text(tokenizer, record.text or "", where)
        length = len(rendered.ids)
        if length < MIN_TOKENS:
            raise UsageError(
                "an item is too short to predict anything", where=where, got=f"{length} tokens", wanted=MIN_TOKENS
            )
        if length > limit and on_long == "refuse":
            raise UsageError(
                "an item is longer than the limit",
                where=where,
                got=f"{length} tokens",
                wanted=f"at most {limit}",
                hint="raise max_tokens_per_item, or let long items be truncated",
            )
        kind: Literal["chat", "text"] = "text" if raw or record.messages is None else "chat"
        yield _item(record.id, record.cls, record.weight, rendered, limit, kind, reasoning=reasoning)


def _item(
    name: str,
    cls: str,
    weight: float,
    rendered: Rendered,
    limit: int,
    kind: Literal["chat", "text"],
    *,
    reasoning: bool,
) -> _Item:
    return _Item(
        id=name,
        cls=cls,
        weight=weight,
        ids=np.asarray(rendered.ids[:limit], dtype=np.int32),
        kind=kind,
        bos=rendered.bos,
        reasoning=reasoning,
        spliced=rendered.spliced > 0,
        truncated=len(rendered.ids) > limit,
    )


def _chunks(path: Path, tokenizer: Tokenizer, limit: int) -> Iterator[_Item]:
    """The whole text in runs of `limit` tokens, each behind its own BOS; a last run of one token is dropped."""
    waiting: list[int] = []
    count = 0
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = limit - len(bos)

    def cut(ids: list[int]) -> _Item:
        return _item(
            f"chunk-{count:06d}", TEXT_CLASS, 1.0, Rendered(bos + ids, "added", 0), limit, "text", reasoning=False
        )

    begun = False
    for piece in read_pieces(path):
        begun = begun or bool(piece.strip())
        if not begun:
            continue
        waiting += render_text(tokenizer, piece, path.name).ids[len(bos) :]
        while len(waiting) >= step:
            count += 1
            yield cut(waiting[:step])
            waiting = waiting[step:]
    if len(bos) + len(waiting) >= MIN_TOKENS:
        count += 1
        yield cut(waiting)


def _of_classes(items: Sequence[_Item], classes: Sequence[str], path: Path) -> list[_Item]:
    there = sorted({item.cls for item in items})
    for name in classes:
        if name not in there:
            raise UsageError(f"the corpus has no class {name!r}", where=path.name, wanted="one of " + ", ".join(there))
    return [item for item in items if item.cls in classes]


def _chats(items: Sequence[_Item], path: Path) -> list[_Item]:
    found = [item for item in items if item.kind == "chat"]
    if not found:
        raise UsageError(
            "the corpus has no item with messages", where=path.name, wanted="chats, since chat_only is set"
        )
    return found


def _within(items: Sequence[_Item], budget: int | None, most: int | None, path: Path) -> list[_Item]:
    """Whole items, one per class in turn, in file order; the result is in file order again."""
    queues: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        queues.setdefault(item.cls, []).append(index)
    for queue in queues.values():
        queue.reverse()  # pop() takes the first of the file
    taken: list[int] = []
    spent = 0
    while queues:
        for cls in list(queues):
            if most is not None and len(taken) == most:
                queues.clear()
                break
            size = len(items[queues[cls][-1]].ids)
            if budget is not None and spent + size > budget:
                del queues[cls]
                continue
            taken.append(queues[cls].pop())
            spent += size
            if not queues[cls]:
                del queues[cls]
    if not taken:
        shortest = min(len(item.ids) for item in items)
        raise UsageError(
            "max_tokens holds no item of the corpus",
            where=path.name,
            got=budget,
            wanted=f"at least {shortest}, the shortest item",
        )
    return [items[index] for index in sorted(taken)]


def _corpus(taken: Sequence[_Item], every: Sequence[_Item], tokenizer: Tokenizer, limit: int) -> Corpus:
    rows: list[Row] = []
    digest = hashlib.sha256()
    for item in taken:
        ids = item.ids.astype("<i8")
        ids.flags.writeable = False
        digest.update(canonical_json({"id": item.id, "class": item.cls, "weight": item.weight, "tokens": len(ids)}))
        digest.update(ids.tobytes())
        rows.append(Row(item.id, item.cls, ids, item.weight))
    writers: dict[str, list[str]] = {}
    for item in taken:
        kind = writers.setdefault(item.kind, [])
        if item.bos not in kind:
            kind.append(item.bos)
    return Corpus(
        items=tuple(rows),
        hash=digest.hexdigest(),
        template_hash=tokenizer.template_hash,
        tokenizer_hash=tokenizer.hash,
        bos_policy="; ".join(f"{kind}: {' or '.join(sorted(by))}" for kind, by in sorted(writers.items())),
        max_tokens_per_item=limit,
        truncated_items=sum(item.truncated for item in taken),
        classes=tuple(sorted({item.cls for item in taken})),
        reasoning_items=sum(item.reasoning for item in taken),
        spliced_items=sum(item.spliced for item in taken),
        left_out_items=len(every) - len(taken),
        left_out_tokens=sum(len(item.ids) for item in every) - sum(len(item.ids) for item in taken),
    )
