"""The sums by themselves, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.observe.conftest import corpus_of

import gemcut.observe.gram as gram_module
from gemcut.errors import UsageError
from gemcut.observe.batches import lay_out
from gemcut.observe.columns import ColumnSums
from gemcut.observe.gram import GramSum
from gemcut.observe.near import NearSums
from gemcut.observe.settings import ObserveSettings, gram_splits
from gemcut.stream.corpus import Row


def data(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def test_columns_do_not_depend_on_how_rows_come() -> None:
    a = data(300, 17).bfloat16()
    whole, pieces = ColumnSums(17), ColumnSums(17)
    whole.add(a, 1)
    for part in a.split([1, 63, 64, 65, 107]):
        pieces.add(part, 1)
    exact = a.double().numpy()
    for sums in (whole, pieces):
        out = {k: v.numpy() for k, v in sums.tensors("x").items()}
        assert out["linear.x.n"].tolist() == [0, 300]
        np.testing.assert_allclose(out["linear.x.a1"][1], exact.sum(0), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(out["linear.x.a2"][1], (exact**2).sum(0), rtol=1e-6)
        np.testing.assert_allclose(out["linear.x.a4"][1], (exact**4).sum(0), rtol=1e-6)
        assert (out["linear.x.amax"] == np.abs(exact).max(0)).all()
        assert not out["linear.x.a2"][0].any()


def test_columns_keep_units_apart() -> None:
    sums = ColumnSums(5, units=3)
    sums.add(data(7, 5), 0, 2)
    out = sums.tensors("x")
    assert out["linear.x.n"].tolist() == [[0, 0, 7], [0, 0, 0]]
    assert out["linear.x.a2"].shape == (2, 3, 5)
    assert out["linear.x.amax"][:2].abs().sum() == 0


def test_a_fourth_power_beyond_float32_is_noticed() -> None:
    sums = ColumnSums(3)
    sums.add(torch.full((2, 3), 1e10), 0)
    assert not sums.finite()


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("splits", [1, 2])
def test_gram_is_the_weighted_product(monkeypatch: pytest.MonkeyPatch, block: int, splits: int) -> None:
    monkeypatch.setattr(gram_module, "_BLOCK", block)
    monkeypatch.setattr(gram_module, "_STAGED_ROWS", 16)
    sums = GramSum(10, splits, 1e-6)
    parts = [(data(n, 10, n), data(n, 6, 100 + n), n % 2) for n in (3, 40, 1, 16, 7)]
    for x, y, split in parts:
        sums.add(x, y, split)
    out = {k.removeprefix("gram.o."): v.numpy() for k, v in sums.tensors("o").items()}
    for s in range(splits):
        mine = [(x.double().numpy(), y.double().numpy()) for x, y, at in parts if splits == 1 or at == s]
        x, y = np.concatenate([m[0] for m in mine]), np.concatenate([m[1] for m in mine])
        w = 1 / ((y**2).mean(1) + 1e-6)
        np.testing.assert_allclose(out["g"][s], (x * w[:, None]).T @ x, rtol=1e-5, atol=1e-5 * np.trace(x.T @ x))
        np.testing.assert_allclose(out["x"][s], w @ x, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(out["w"][s], w.sum(), rtol=1e-5)
        assert out["n"][s] == len(x)
        assert (out["g"][s] == out["g"][s].T).all()


def test_gram_survives_an_output_of_zeros() -> None:
    sums = GramSum(4, 1, 1e-6)
    sums.add(torch.zeros(3, 4), torch.zeros(3, 4), 0)
    assert sums.finite()


def test_few_experts_have_fewer_runners_up() -> None:
    """k = 2 of 3: one runner-up, not two."""
    corpus = corpus_of((Row("q", "a", np.full(5, 4), 1.0),))
    batch = lay_out(corpus, 10, 10).batches[0]
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 5)
    near = NearSums(3, 2, np.ones(5, np.bool_))
    near.add(batch, logits, torch.tensor([[0, 1]] * 5))
    out = near.tensors()
    assert out["near.count"].tolist() == [0, 0, 5]
    assert out["near.margin"].tolist() == [0, 0, 5.0]
    assert out["near.heir"].tolist() == [[0, 0, 5], [0, 0, 5], [0, 0, 0]]
    assert out["near.sample_index"].tolist() == [[0, 1, 2]] * 5


def test_all_experts_routed_leave_no_runner_up() -> None:
    corpus = corpus_of((Row("q", "a", np.full(4, 4), 1.0),))
    near = NearSums(2, 2, np.ones(4, np.bool_))
    near.add(lay_out(corpus, 10, 10).batches[0], torch.rand(4, 2), torch.tensor([[0, 1]] * 4))
    assert near.tensors()["near.count"].sum() == 0


def test_gram_tokens_follow_the_width() -> None:
    settings = ObserveSettings()
    assert settings.gram_take(512, 10_000) == 10_000
    assert settings.gram_take(512, 10**6) == 16384
    assert settings.gram_take(8192, 10**6) == 32768
    assert (gram_splits(4096), gram_splits(8192)) == (2, 1)


@pytest.mark.parametrize("bad", [{"batch_tokens": 0}, {"near_sample": -1}, {"gram_tokens": 0}])
def test_settings_that_mean_nothing(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="too small"):
        ObserveSettings(**bad)
