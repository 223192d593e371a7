"""Costs of removing heads against an explicit refit, and the search against every set there is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.score.test_kv_balance import balances, legal_sets

from gemcut.errors import QualityError, UsageError
from gemcut.score.head_cost import Balance, LayerCost, _exchanged, invert
from gemcut.types import F64


@dataclass(frozen=True)
class Problem:
    """Tokens x [T, d] with weights w [T], o_proj weight [H, d], γ [H]."""

    x: F64
    w: F64
    weight: F64
    gamma: F64 | None
    heads: int
    dim: int
    ridge_rel: float

    @property
    def gram(self) -> F64:
        return (self.x * self.w[:, None]).T @ self.x

    @property
    def ridge(self) -> float:
        return self.ridge_rel * float(np.trace(self.gram)) / self.gram.shape[0]

    @property
    def layer(self) -> LayerCost:
        return LayerCost(self.gram, self.weight, self.heads, self.dim, self.ridge_rel, self.gamma)

    def refit(self, removed: tuple[int, ...]) -> float:
        """The minimum of the healing objective, by a solver that knows nothing of Gram matrices."""
        scaled = self.weight if self.gamma is None else self.weight * self.gamma[:, None]
        d = self.heads * self.dim
        rows = np.concatenate([self.x * np.sqrt(self.w)[:, None], np.sqrt(self.ridge) * np.eye(d)])
        target = rows @ scaled.T
        kept = [c for c in range(d) if c // self.dim not in removed]
        if not kept:
            return float((target**2).sum())
        found = np.linalg.lstsq(rows[:, kept], target, rcond=None)[0]
        return float(((target - rows[:, kept] @ found) ** 2).sum())


def make_problem(seed: int, heads: int = 6, dim: int = 2, tokens: int = 60, ridge_rel: float = 1e-2) -> Problem:
    """Heads that share what they see, so that one can stand in for another."""
    rng = np.random.default_rng(seed)
    d = heads * dim
    mix = rng.normal(size=(d // 2 + 1, d))
    x = rng.normal(size=(tokens, d // 2 + 1)) @ mix + 0.3 * rng.normal(size=(tokens, d))
    weight = rng.normal(size=(7, d)) * np.repeat(rng.lognormal(0, 0.7, heads), dim)
    gamma = rng.lognormal(0, 0.5, 7) if seed % 2 else None
    return Problem(x, rng.lognormal(0, 1, tokens), weight, gamma, heads, dim, ridge_rel)


problems = st.builds(
    make_problem,
    seed=st.integers(0, 10**6),
    heads=st.integers(2, 7),
    dim=st.integers(1, 4),
    tokens=st.integers(40, 80),
    ridge_rel=st.sampled_from([1e-4, 1e-2, 1.0]),
)


@given(problems, st.data())
def test_cost_is_the_residual_of_an_explicit_refit(problem: Problem, data: st.DataObject) -> None:
    removed = tuple(sorted(data.draw(st.sets(st.integers(0, problem.heads - 1), min_size=1))))
    assert problem.layer.cost(removed) == pytest.approx(problem.refit(removed), rel=1e-8)


def test_without_a_ridge_it_is_plain_weighted_least_squares() -> None:
    one = make_problem(3, ridge_rel=0.0)
    assert one.layer.cost([0, 4]) == pytest.approx(one.refit((0, 4)), rel=1e-8)


@given(problems, st.data())
def test_cost_grows_with_the_set_and_stays_below_no_refit(problem: Problem, data: st.DataObject) -> None:
    layer = problem.layer
    order = data.draw(st.permutations(range(problem.heads)))
    before = 0.0
    for size in range(len(order) + 1):
        cost, raw = layer.cost(order[:size]), layer.unhealed(order[:size])
        assert before <= cost * (1 + 1e-9)
        assert cost <= raw * (1 + 1e-9)
        before = cost
    assert layer.cost(order) == pytest.approx(layer.total, rel=1e-8)
    assert layer.relative(order) == pytest.approx(1.0, rel=1e-8)


def test_unhealed_is_the_norm_of_what_the_heads_add() -> None:
    one = make_problem(4, ridge_rel=0.0)
    columns = [c for c in range(12) if c // 2 in (1, 5)]
    added = one.x[:, columns] @ one.weight[:, columns].T
    assert one.layer.unhealed([5, 1]) == pytest.approx(float((one.w[:, None] * added**2).sum()), rel=1e-10)


def test_singles_are_the_costs_of_one_head() -> None:
    layer = make_problem(5).layer
    np.testing.assert_allclose(layer.singles(), [layer.cost([h]) for h in range(6)], rtol=1e-10)


@given(st.integers(0, 10**6), st.sampled_from([4, 6]), st.data())
@settings(max_examples=60)
def test_search_against_every_set(seed: int, heads: int, data: st.DataObject) -> None:
    layer = make_problem(seed, heads).layer
    balance = data.draw(st.sampled_from(balances(heads)))
    count = data.draw(st.integers(1, heads - 1))
    assume(balance.legal(count))
    every = {chosen: layer.cost(chosen) for chosen in legal_sets(balance, count)}
    floor = min(every.values())
    greedy = layer.greedy(count, balance)
    swapped = layer.swap(greedy, balance)
    best = layer.best(count, balance)
    for found in (greedy, swapped, best):
        assert tuple(sorted(found)) in every, (balance, found)
        assert floor <= layer.cost(found) * (1 + 1e-12)
    assert layer.cost(swapped) <= layer.cost(greedy) * (1 + 1e-12)
    assert layer.cost(best) <= layer.cost(swapped) * (1 + 1e-12)


def test_search_finds_the_best_set_nearly_always() -> None:
    """Of 200 layers of 8 heads on 4 KV heads, and it is not far off where it does not."""
    balance, hits, worst = Balance(4, 2, "spread"), 0, 0.0
    sets = legal_sets(balance, 3)
    for seed in range(200):
        layer = make_problem(seed, 8, 1).layer
        floor = min(layer.cost(chosen) for chosen in sets)
        excess = layer.cost(layer.best(3, balance)) / floor - 1
        hits += excess < 1e-9
        worst = max(worst, excess)
    assert hits >= 190
    assert worst < 0.5


def test_joint_search_sees_what_single_costs_cannot() -> None:
    """Heads 0 and 1 say the same: each is free alone, both together are dear."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4))
    x[:, 1] = x[:, 0] + 1e-3 * rng.normal(size=200)
    weight = np.array([[3.0, 3.0, 1.0, 2.0]])
    layer = LayerCost(x.T @ x, weight, 4, 1, 1e-6)
    assert set(np.argsort(layer.singles())[:2]) == {0, 1}
    chosen = layer.best(2, Balance(1, 4, "spread"))
    assert 2 in chosen
    assert len({0, 1} & set(chosen)) == 1
    assert layer.cost(chosen) < 0.2 * layer.cost([0, 1])


def test_swap_mends_a_bad_start() -> None:
    layer = make_problem(8, 8, 2).layer
    balance = Balance(2, 4, "equal")
    for start in legal_sets(balance, 2):
        assert layer.cost(layer.swap(start, balance)) <= layer.cost(start) * (1 + 1e-12)
    worst = max(legal_sets(balance, 2), key=layer.cost)
    assert layer.cost(layer.swap(worst, balance)) < 0.9 * layer.cost(worst)


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=40)
def test_predicted_exchanges_are_exact(seed: int, data: st.DataObject) -> None:
    """A swap is chosen by a formula that never inverts the new set; it must say what `cost` says."""
    layer = make_problem(seed, 6, 2).layer
    gone = tuple(sorted(data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=4))))
    now = layer._remove(gone, 2)
    others = [j for j in range(6) if j not in gone]
    for i in range(len(gone)):
        found = _exchanged(now, i, others)
        wanted = [layer.cost([*(g for g in gone if g != gone[i]), j]) for j in others]
        np.testing.assert_allclose(found, wanted, rtol=1e-8)
    np.testing.assert_allclose([now.cost + now.gain[j] for j in others], [layer.cost([*gone, j]) for j in others])


def test_ties_go_to_the_lower_head() -> None:
    layer = LayerCost(np.eye(6), np.ones((3, 6)), 6, 1, 0.0)
    assert layer.best(3, Balance(3, 2, "spread")) == (0, 2, 4)
    assert layer.best(2, Balance(1, 6, "spread")) == (0, 1)
    assert layer.best(4, Balance(3, 2, "groups")) == (0, 1, 2, 3)


def test_best_is_in_the_order_of_elimination() -> None:
    layer = make_problem(11, 8, 2).layer
    order = layer.best(4, Balance(4, 2, "spread"))
    left = set(order)
    for k, head in enumerate(order):
        costs = {h: layer.cost([*order[:k], h]) for h in left}
        assert costs[head] <= min(costs.values()) * (1 + 1e-9)
        left.remove(head)


def test_gamma_scales_the_rows() -> None:
    one = make_problem(13)
    assert one.gamma is not None
    scaled = LayerCost(one.gram, one.weight * one.gamma[:, None], 6, 2)
    given_apart = LayerCost(one.gram, one.weight, 6, 2, gamma=one.gamma)
    assert given_apart.cost([1, 2]) == scaled.cost([1, 2])
    assert given_apart.cost([1, 2]) != pytest.approx(LayerCost(one.gram, one.weight, 6, 2).cost([1, 2]), rel=1e-3)


def test_arguments_stay_as_they_were() -> None:
    one = make_problem(15)
    gram, weight = one.gram, one.weight.copy()
    gram.flags.writeable = weight.flags.writeable = False
    before = gram.copy()
    LayerCost(gram, weight, 6, 2).best(2, Balance(3, 2, "spread"))
    np.testing.assert_array_equal(gram, before)


# ---------------------------------------------------------------- the inverse


@pytest.mark.parametrize("d", [1, 7, 512, 513, 1100])
def test_inverse_by_blocks(d: int) -> None:
    rng = np.random.default_rng(d)
    x = rng.normal(size=(2 * d + 5, d)) * rng.lognormal(0, 1, d)
    gram = x.T @ x
    ridge = 1e-3 * float(np.trace(gram)) / d
    np.testing.assert_allclose(invert(gram, ridge) @ (gram + ridge * np.eye(d)), np.eye(d), atol=1e-8)


def test_no_inverse_is_refused() -> None:
    x = np.random.default_rng(0).normal(size=(3, 8))
    with pytest.raises(QualityError, match="no inverse"):
        LayerCost(x.T @ x - 1e-9 * np.eye(8), np.ones((2, 8)), 4, 2, 0.0)
    with pytest.raises(QualityError, match="no inverse"):
        LayerCost(np.zeros((8, 8)), np.ones((2, 8)), 4, 2)


@pytest.mark.parametrize("where", ["gram", "weight", "gamma"])
def test_values_that_are_no_numbers_are_refused(where: str) -> None:
    parts = {"gram": np.eye(8), "weight": np.ones((2, 8)), "gamma": np.ones(2)}
    parts[where].flat[-1] = np.nan
    with pytest.raises(QualityError, match="not finite"):
        LayerCost(parts["gram"], parts["weight"], 4, 2, gamma=parts["gamma"])


def test_shapes_and_heads_are_checked() -> None:
    with pytest.raises(UsageError, match="number of heads"):
        LayerCost(np.eye(8), np.ones((2, 8)), 4, 3)
    with pytest.raises(UsageError, match="another width"):
        LayerCost(np.eye(8), np.ones((2, 8)), 4, 2, gamma=np.ones(3))
    with pytest.raises(UsageError, match="ridge"):
        LayerCost(np.eye(8), np.ones((2, 8)), 4, 2, -1.0)
    layer = LayerCost(np.eye(8), np.ones((2, 8)), 4, 2)
    with pytest.raises(UsageError, match="no such head"):
        layer.cost([4])
    with pytest.raises(UsageError, match="another layer"):
        layer.greedy(1, Balance(4, 2, "spread"))
