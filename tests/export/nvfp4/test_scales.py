"""Chosen block scales: never worse than the plain one, as good as trying every FP8 number, and weighted where asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemcut.export.nvfp4.codec import GROUP, encode, global_scale, to_blocks
from gemcut.export.nvfp4.scales import block_scales, column_weights
from gemcut.nvfp4.choices import METHODS
from gemcut.nvfp4.decode import dequantise


def drawn(kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((64, 256), generator=generator)
    if kind == "heavy":  # Student's t with 5 degrees of freedom
        squares = torch.randn((5, 64, 256), generator=generator).square().mean(0)
        normal = normal / squares.sqrt()
    return normal * 0.02


def squared_errors(weights: torch.Tensor, scales: torch.Tensor, scale: float) -> np.ndarray:
    """Of every block [R, B], by the tables."""
    found = encode(to_blocks(weights), scales, scale)
    back = dequantise(found.packed.numpy(), found.scales.view(torch.uint8).numpy(), scale)
    return ((back - weights.numpy()) ** 2).reshape(len(weights), -1, GROUP)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_each_method_loses_less_than_the_one_before(kind: str) -> None:
    weights = drawn(kind)
    scale = global_scale(float(weights.abs().max()))
    blocks = to_blocks(weights)
    errors = [squared_errors(weights, block_scales(blocks, scale, m), scale).sum(2) for m in METHODS[:3]]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()  # block by block
    assert (errors[2] <= errors[0] * (1 + 1e-5)).all()
    plain, four, swept = (float(one.sum()) for one in errors)
    assert four < 0.92 * plain
    assert swept < 0.93 * four


def test_the_sweep_finds_what_trying_every_fp8_number_finds() -> None:
    weights = drawn("normal", 3)[:8]
    scale = global_scale(float(weights.abs().max()))
    blocks = to_blocks(weights)
    every = [
        squared_errors(weights, torch.full((8, 16), float(s)), scale).sum(2)
        for s in torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ]
    swept = squared_errors(weights, block_scales(blocks, scale, "sweep"), scale).sum(2)
    np.testing.assert_allclose(swept, np.min(every, axis=0), rtol=1e-4)


def test_weights_move_the_error_to_columns_that_matter_less() -> None:
    weights = drawn("normal", 5)
    scale = global_scale(float(weights.abs().max()))
    blocks = to_blocks(weights)
    squares = np.random.default_rng(6).random(256) ** 6
    plain = squared_errors(weights, block_scales(blocks, scale, "sweep"), scale)
    asked = column_weights(squares)
    found = squared_errors(weights, block_scales(blocks, scale, "weighted", asked), scale)
    matter = squares.reshape(1, -1, GROUP)
    assert (found * matter).sum() < 0.97 * (plain * matter).sum()
    assert found.sum() > plain.sum()
    even = block_scales(blocks, scale, "weighted", column_weights(np.full(256, 7.0)))
    assert torch.equal(even, block_scales(blocks, scale, "sweep"))


def test_columns_never_seen_count_alike() -> None:
    assert torch.equal(column_weights(np.zeros(32)), torch.ones((16, 1, 2)))


def test_columns_keep_their_places() -> None:
    found = column_weights(np.arange(32.0))
    assert found[:, 0, 0].argmax() == 15
    assert found[3, 0, 1] == pytest.approx(19 / 15.5)


def test_threads_change_nothing() -> None:
    weights = drawn("heavy", 9)
    scale = global_scale(float(weights.abs().max()))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            blocks = to_blocks(weights)
            found.append(encode(blocks, block_scales(blocks, scale, "sweep"), scale))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].packed, found[1].packed)
    assert found[0].squared_error == found[1].squared_error
