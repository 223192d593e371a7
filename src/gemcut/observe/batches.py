"""Which items run together, and where every token of the corpus stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from gemcut.errors import UsageError
from gemcut.observe.settings import SPLITS
from gemcut.stream.corpus import Corpus
from gemcut.types import I64

_SHORTEST = 0.75  # an item runs with longer ones only if padding costs at most a quarter


@dataclass(frozen=True, eq=False)
class Batch:
    """Items that run in one call, padded on the right. B items, S tokens of the longest, T = B·S.

    items: indices into the corpus, all of one split.   lengths, starts: [B] tokens, first token in corpus order.
    """

    items: tuple[int, ...]
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    split: int

    @property
    def width(self) -> int:
        return max(self.lengths)

    @cached_property
    def live(self) -> torch.Tensor | None:
        """bool [T], False at padding; None where there is none."""
        if len(set(self.lengths)) == 1:
            return None
        return (torch.arange(self.width)[None, :] < torch.tensor(self.lengths)[:, None]).reshape(-1)

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """[T] position in `items` of every token, padding included."""
        return np.repeat(np.arange(len(self.items)), self.width)

    @cached_property
    def token(self) -> NDArray[np.int64]:
        """[T] index of every token in corpus order; -1 at padding."""
        at: NDArray[np.int64] = np.arange(self.width)[None, :] + np.asarray(self.starts)[:, None]
        at[np.arange(self.width)[None, :] >= np.asarray(self.lengths)[:, None]] = -1
        return at.ravel()


@dataclass(frozen=True, eq=False)
class Layout:
    """The corpus as the pass sees it. Tokens are numbered in corpus order, 0 … N-1."""

    corpus: Corpus
    starts: I64  # [Q + 1]
    batches: tuple[Batch, ...]
    class_of: I64  # [Q]

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    def ids(self, batch: Batch) -> torch.Tensor:
        """Token ids [B, S], zero at padding."""
        out = np.zeros((len(batch.items), batch.width), np.int64)
        for row, item in enumerate(batch.items):
            out[row, : batch.lengths[row]] = self.corpus.items[item].ids
        return torch.from_numpy(out)

    def name_token(self, token: int) -> str:
        """Item id and position of a token, for messages."""
        item = int(np.searchsorted(self.starts, token, side="right")) - 1
        return f"item {self.corpus.items[item].id!r}, token {token - int(self.starts[item])}"


def lay_out(corpus: Corpus, batch_tokens: int, vocabulary: int) -> Layout:
    """Group items of similar length; a function of the items alone, never of their order of arrival.

    Longest first, so that what does not fit into memory fails at once.

    Raises:
        UsageError: the corpus is empty, an item has no token, or a token id is not in the vocabulary.
    """
    if not corpus.items:
        raise UsageError("the corpus has no items")
    lengths = [len(row.ids) for row in corpus.items]
    for row in corpus.items:
        if not len(row.ids) or int(row.ids.min()) < 0 or int(row.ids.max()) >= vocabulary:
            raise UsageError(
                "an item has token ids that the model does not know",
                where=f"item {row.id!r}",
                got=f"{int(row.ids.min())} to {int(row.ids.max())}" if len(row.ids) else "no token",
                wanted=f"0 to {vocabulary - 1}",
                hint="was the corpus tokenised for another model?",
            )
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    index = {name: i for i, name in enumerate(corpus.classes)}
    class_of = np.array([index[row.cls] for row in corpus.items], np.int64)
    batches: list[Batch] = []
    for split in range(SPLITS):
        order = sorted(range(split, len(lengths), SPLITS), key=lambda i: (-lengths[i], corpus.items[i].id))
        for items in _groups(order, lengths, batch_tokens):
            batches.append(Batch(items, tuple(lengths[i] for i in items), tuple(int(starts[i]) for i in items), split))
    batches.sort(key=lambda b: (-b.width * len(b.items), b.split, b.items))
    return Layout(corpus, starts, tuple(batches), class_of)


def _groups(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = []
    group: list[int] = []
    for i in order:
        longest = lengths[group[0]] if group else lengths[i]
        full = (len(group) + 1) * longest > batch_tokens
        if group and (full or lengths[i] < _SHORTEST * longest):
            out.append(tuple(group))
            group = []
        group.append(i)
    if group:
        out.append(tuple(group))
    return out


def strided(tokens: int, take: int) -> NDArray[np.bool_]:
    """bool [N]: exactly `take` of N tokens, evenly spread.  chosen[t] ⇔ ⌊(t+1)·take/N⌋ > ⌊t·take/N⌋"""
    steps = np.arange(tokens + 1, dtype=np.int64) * take // tokens
    return np.diff(steps) > 0
