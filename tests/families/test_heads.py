"""Which head cuts leave every query head on its own KV head."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.errors import UsageError
from gemcut.families.base import Attention
from gemcut.families.heads import kept_kv_heads, kv_heads_after, legal_head_counts, mode_of
from gemcut.types import Plan


def attention(heads: int, kv_heads: int, *, full: bool = False) -> Attention:
    return Attention(heads, kv_heads, 16, full, "q", "k", "v", "o")


SLIDING_31B, FULL_31B = attention(32, 16), attention(32, 4, full=True)


def test_the_ways_of_31b() -> None:
    assert (kv_heads_after(SLIDING_31B, 24), kv_heads_after(FULL_31B, 24)) == (12, 4)
    assert (kv_heads_after(SLIDING_31B, 28), kv_heads_after(FULL_31B, 28)) == (14, 4)
    assert (kv_heads_after(SLIDING_31B, 16), kv_heads_after(FULL_31B, 16)) == (16, 4)
    assert [kv_heads_after(SLIDING_31B, m) for m in (0, 25, 33)] == [None, None, None]
    assert legal_head_counts({0: SLIDING_31B, 5: FULL_31B}) == tuple(range(4, 33, 4))


def test_one_kv_head_loses_query_heads_only() -> None:
    assert [kv_heads_after(attention(4, 1), m) for m in range(1, 5)] == [1, 1, 1, 1]
    assert legal_head_counts({0: attention(4, 1)}) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("keep", "kv"),
    [((0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3)), ((1, 2, 4, 7), (0, 1, 2, 3)), ((0, 1, 6, 7), (0, 3)), ((5,), (2,))],
)
def test_even_cuts_keep_their_kv_heads(keep: tuple[int, ...], kv: tuple[int, ...]) -> None:
    assert kept_kv_heads(2, keep, where="layer 0") == kv


@pytest.mark.parametrize("keep", [(0, 1, 2), (0, 1, 2, 4), (0, 2, 3, 4, 5, 7), ()])
def test_uneven_cuts_are_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        kept_kv_heads(2, keep, where="layer 7 of the plan")
    assert "layer 7 of the plan" in str(caught.value)


@given(kv=st.integers(1, 4), group=st.integers(1, 3), data=st.data())
def test_what_is_accepted_attends_as_before(kv: int, group: int, data: st.DataObject) -> None:
    """The model's own rule, repeat_interleave of the KV heads, over every subset of the heads."""
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, kv * group - 1), min_size=1))))
    owners = [head // group for head in keep]
    stay = sorted(set(owners))
    runs = [j for j in stay for _ in range(len(keep) // len(stay))]
    if runs == owners:
        assert kept_kv_heads(group, keep, where="") == tuple(stay)
    else:
        with pytest.raises(UsageError, match="another KV head"):
            kept_kv_heads(group, keep, where="")


@given(kv=st.integers(1, 6), group=st.integers(1, 6))
def test_a_count_is_legal_where_a_cut_of_one_of_the_two_kinds_exists(kv: int, group: int) -> None:
    one = attention(kv * group, kv)
    thin = {kv * n for n in range(1, group + 1)}
    groups = {group * n for n in range(1, kv + 1)}
    assert set(legal_head_counts({0: one})) == thin | groups
    for m in thin:
        assert kv_heads_after(one, m) == kv
    for a, m in itertools.pairwise(sorted(groups - thin)):
        assert (kv_heads_after(one, a) or 0) < (kv_heads_after(one, m) or 0)


def test_mode_of_a_plan() -> None:
    assert mode_of(Plan("heads", "f", 4, {})) == "mask"
    assert mode_of(Plan("heads", "f", 4, {}, params={"mode": "structural"})) == "structural"
    for bad in ("reshape", None, 3):
        with pytest.raises(UsageError, match="no such way") as caught:
            mode_of(Plan("heads", "f", 4, {}, params={"mode": bad}))
        assert "mask or structural" in str(caught.value)
