"""KL divergence against closed forms and against float64 arithmetic done another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gemcut.evaluate.kld_tile import compare


def logits(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed))


def test_two_outcomes_by_hand() -> None:
    """KL((¾, ¼) ‖ (¼, ¾)) = ½ ln 3; and the direction: KL((½, ½) ‖ (⅘, ⅕)) is not its reverse."""
    p, q = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()
    done = compare([p, q], torch.tensor([0]))
    assert done.kl[0, 0].item() == pytest.approx(0.5 * math.log(3), abs=1e-7)
    assert done.nll[:, 0].tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-7)
    assert not done.same[0, 0]
    half, skew = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[4.0, 1.0]]).log()
    forward = compare([half, skew], torch.tensor([0])).kl.item()
    assert forward == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), abs=1e-7)
    assert compare([skew, half], torch.tensor([0])).kl.item() == pytest.approx(
        0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=1e-7
    )


@pytest.mark.parametrize("vocabulary", [2, 320, 5000])
def test_agrees_with_numpy_in_extended_precision(vocabulary: int) -> None:
    a, b = logits(9, vocabulary, 0), logits(9, vocabulary, 1)
    target = torch.arange(9) % vocabulary
    x, y = (t.numpy().astype(np.longdouble) for t in (a, b))
    x, y = (t - np.log(np.exp(t).sum(-1, keepdims=True)) for t in (x, y))
    done = compare([a, b], target)
    np.testing.assert_allclose(done.kl[0].numpy(), (np.exp(x) * (x - y)).sum(-1).astype(float), rtol=1e-12)
    rows = np.arange(9)
    np.testing.assert_allclose(done.nll[1].numpy(), -y[rows, target.numpy()].astype(float), rtol=1e-12)
    assert done.same[0].tolist() == (x.argmax(-1) == y.argmax(-1)).tolist()


def test_equal_logits_give_exactly_zero_and_never_less() -> None:
    a = logits(50, 1000, 2)
    done = compare([a, a.clone(), a + 1e-7], torch.zeros(50, dtype=torch.int64))
    assert (done.kl[0] == 0).all()
    assert done.same[0].all()
    assert torch.equal(done.nll[0], done.nll[1])
    assert (done.kl[1] >= 0).all()


def test_a_shift_changes_nothing_and_extreme_logits_stay_finite() -> None:
    a = logits(5, 100, 3)
    assert compare([a, a + 8.0], torch.zeros(5, dtype=torch.int64)).kl.max() < 1e-12
    sure = torch.full((1, 100), -3e4)
    sure[0, 7] = 3e4
    other = torch.full((1, 100), -3e4)
    other[0, 8] = 3e4
    done = compare([sure, other], torch.tensor([7]))
    assert done.kl.item() == pytest.approx(6e4)
    assert done.nll[:, 0].tolist() == [0.0, pytest.approx(6e4)]


def test_inputs_are_left_alone_and_a_base_may_be_alone() -> None:
    a, b = logits(3, 20, 4), logits(3, 20, 5)
    kept = b.clone()
    compare([a, b], torch.zeros(3, dtype=torch.int64))
    assert torch.equal(b, kept)
    alone = compare([a], torch.zeros(3, dtype=torch.int64))
    assert alone.nll.shape == (1, 3)
    assert alone.kl.shape == alone.same.shape == (0, 3)
