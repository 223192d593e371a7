"""Which heads may go together, against the definition of each rule."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gemcut.errors import UsageError
from gemcut.score.kv_balance import Balance, Rule, lowest


def balances(heads: int) -> list[Balance]:
    return [
        Balance(kv, heads // kv, rule)
        for kv in range(1, heads + 1)
        if heads % kv == 0
        for rule in ("spread", "equal", "groups")
    ]


def legal_sets(balance: Balance, count: int) -> list[tuple[int, ...]]:
    """Written from the definition, not from `may_add`."""
    out = []
    for chosen in combinations(range(balance.heads), count):
        sizes = np.bincount([h // balance.group for h in chosen], minlength=balance.kv_heads)
        good = {
            "spread": sizes.max() <= np.ceil(count / balance.kv_heads),
            "equal": sizes.max() == sizes.min(),
            "groups": set(sizes.tolist()) <= {0, balance.group},
        }
        if good[balance.rule]:
            out.append(chosen)
    return out


@pytest.mark.parametrize(
    ("rule", "kv", "group", "legal"),
    [
        ("spread", 4, 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("equal", 4, 2, [0, 4]),
        ("equal", 2, 4, [0, 2, 4, 6]),
        ("groups", 4, 2, [0, 2, 4, 6]),
        ("groups", 2, 4, [0, 4]),
        ("groups", 1, 4, [0]),
    ],
)
def test_legal_counts(rule: Rule, kv: int, group: int, legal: list[int]) -> None:
    balance = Balance(kv, group, rule)
    assert [n for n in range(-1, kv * group + 2) if balance.legal(n)] == legal


def test_an_illegal_count_names_its_neighbours() -> None:
    with pytest.raises(UsageError, match="do not divide among 4 KV groups") as error:
        Balance(4, 8, "equal").require(6, "layer 5")
    assert error.value.wanted == "0 or 4 or 8 or 12"
    assert error.value.where == "layer 5"
    with pytest.raises(UsageError, match="whole KV groups of 2"):
        Balance(16, 2, "groups").require(3)


@given(st.sampled_from(balances(8)), st.integers(1, 7), st.integers(0, 10**6))
def test_adding_what_may_be_added_never_gets_stuck(balance: Balance, count: int, seed: int) -> None:
    assume(balance.legal(count))
    rng = np.random.default_rng(seed)
    values = rng.random(8)
    assert lowest(values, count, balance) in set(legal_sets(balance, count))
    chosen: list[int] = []
    while len(chosen) < count:
        free = [h for h in range(8) if balance.may_add(chosen, h, count)]
        assert free
        chosen.append(free[int(rng.integers(len(free)))])
    assert tuple(sorted(chosen)) in set(legal_sets(balance, count))
    assert not any(balance.may_add(chosen, h, count) for h in range(8))
