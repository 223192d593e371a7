from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.observe.conftest import corpus_of

from gemcut.errors import UsageError
from gemcut.observe.batches import lay_out, strided
from gemcut.stream.corpus import Row

lengths_of = st.lists(st.integers(2, 50), min_size=1, max_size=40)


@given(lengths_of, st.integers(1, 200))
def test_every_token_is_in_one_batch_once(lengths: list[int], batch_tokens: int) -> None:
    corpus = corpus_of(tuple(Row(f"q{i}", "a", np.full(n, 5), 1.0) for i, n in enumerate(lengths)))
    layout = lay_out(corpus, batch_tokens, 10)
    seen = np.concatenate([b.token[b.token >= 0] for b in layout.batches])
    assert sorted(seen.tolist()) == list(range(sum(lengths)))
    for batch in layout.batches:
        assert len(batch.items) == 1 or batch.width * len(batch.items) <= batch_tokens
        assert {i % 2 for i in batch.items} == {batch.split}
        padding = batch.width * len(batch.items) - sum(batch.lengths)
        assert padding <= batch.width * len(batch.items) / 4
        assert (batch.live is None) == (padding == 0)
        if batch.live is not None:
            assert (batch.live.numpy() == (batch.token >= 0)).all()


@given(st.integers(1, 5000), st.data())
def test_a_stride_takes_exactly_as_many_and_spreads_them(tokens: int, data: st.DataObject) -> None:
    take = data.draw(st.integers(1, tokens))
    chosen = np.flatnonzero(strided(tokens, take))
    assert len(chosen) == take
    gaps = np.diff(np.concatenate([[-1], chosen, [tokens]]))
    assert gaps.max() <= -(-tokens // take) + 1


def test_names_of_tokens() -> None:
    corpus = corpus_of(tuple(Row(f"q{i}", "a", np.full(n, 5), 1.0) for i, n in enumerate([3, 4])))
    layout = lay_out(corpus, 10, 10)
    assert layout.name_token(0) == "item 'q0', token 0"
    assert layout.name_token(3) == "item 'q1', token 0"
    assert layout.name_token(6) == "item 'q1', token 3"


def test_an_item_without_tokens_is_refused() -> None:
    corpus = corpus_of((Row("q0", "a", np.zeros(0, np.int64), 1.0),))
    with pytest.raises(UsageError, match="does not know"):
        lay_out(corpus, 10, 10)
