"""The codec against torch's float8 casts, against a search over all codes, and against the tables that read it back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.errors import CheckpointError
from gemcut.export.nvfp4.codec import (
    GROUP,
    RANGE,
    Coded,
    encode,
    fp8_of_largest,
    global_scale,
    magnitudes,
    round_into,
)
from gemcut.export.nvfp4.scales import block_scales
from gemcut.nvfp4.decode import E2M1, E4M3, dequantise

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
finite = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False)


def rounded(y: torch.Tensor) -> torch.Tensor:
    return round_into(torch.empty_like(y), y, torch.empty_like(y))


def coded(weights: torch.Tensor) -> tuple[Coded, float]:
    scale = global_scale(float(weights.abs().max()))
    largest = weights.float().view(len(weights), -1, GROUP).abs().amax(2)
    return encode(weights, fp8_of_largest(largest, scale), scale), scale


def read_back(found: Coded, scale: float) -> np.ndarray:
    return dequantise(found.packed.numpy(), found.scales.view(torch.uint8).numpy(), scale)


def nearest(y: float) -> int:
    """By brute force: the nearest code, the even one of two that are equally near."""
    distances = [abs(min(y, 6.0) - value) for value in GRID]
    return min(range(8), key=lambda code: (distances[code], code % 2))


def test_e4m3_table_is_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)


@given(st.floats(0, 2.0**100, width=32, allow_subnormal=False))
@settings(max_examples=500)
def test_rounds_to_the_nearest_code(y: float) -> None:
    value = torch.tensor([y], dtype=torch.float32)
    assert float(rounded(value)) == GRID[nearest(y)]


def test_ties_go_to_the_even_code_and_their_neighbours_do_not() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert rounded(ties).tolist() == wanted
    below, above = torch.nextafter(ties, torch.zeros(7)), torch.nextafter(ties, torch.full((7,), 9.0))
    assert rounded(below).tolist() == GRID[:7]
    assert rounded(above).tolist() == GRID[1:]


def test_every_code_in_every_place_reads_back_as_itself() -> None:
    codes = torch.arange(16).repeat(16, 1)
    codes = torch.stack([row.roll(i) for i, row in enumerate(codes)])  # [16, 16]
    weights = torch.from_numpy(E2M1)[codes] + 0.0
    found, scale = coded(weights)
    np.testing.assert_allclose(read_back(found, scale), weights.numpy(), rtol=3e-7)  # G is a float32 beside 448
    low, high = found.packed & 15, found.packed >> 4
    np.testing.assert_array_equal(E2M1[low.numpy()], weights[:, 0::2].numpy())
    np.testing.assert_array_equal(E2M1[high.numpy()], weights[:, 1::2].numpy())
    assert not (low == 8).any()  # no negative zero
    assert not (high == 8).any()


@given(st.lists(finite, min_size=2 * GROUP, max_size=2 * GROUP))
@settings(max_examples=300)
def test_any_finite_tensor_reads_back_within_its_blocks_step(values: list[float]) -> None:
    weights = torch.tensor(values, dtype=torch.float32).view(2, GROUP)
    found, scale = coded(weights)
    assert math.isfinite(scale)
    assert scale > 0
    back, scales = read_back(found, scale), found.scales.float().numpy()
    assert np.isfinite(back).all()
    assert (scales > 0).all()
    assert (scales <= 448).all()
    step = scales / scale  # half the widest step between codes is one scale; a scale rounds by at most a sixteenth
    with np.errstate(over="ignore"):
        assert (np.abs(back.astype(np.float64) - weights.double().numpy()) <= 1.4 * step.astype(np.float64)).all()
    zero = (weights == 0).all(1).numpy()
    assert (back[zero] == 0).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["minmax", "four_over_six", "sweep"]))
@settings(max_examples=30, deadline=None)
def test_scales_are_the_casts_of_torch(seed: int, method: str) -> None:
    weights = torch.randn((8, 64), generator=torch.Generator().manual_seed(seed)) * 2.0 ** (seed % 40 - 20)
    scale = global_scale(float(weights.abs().max()))
    scales = block_scales(weights, scale, method)  # type: ignore[arg-type]
    assert torch.equal(scales.to(torch.float8_e4m3fn).float(), scales)
    if method == "minmax":
        largest = weights.view(8, 4, 16).abs().amax(2)
        wanted = (largest * scale / 6).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(scales, wanted)


def test_errors_are_what_reading_back_gives() -> None:
    weights = torch.randn((32, 128), generator=torch.Generator().manual_seed(1)).bfloat16()
    found, scale = coded(weights)
    wanted = weights.double().numpy()
    change = ((read_back(found, scale) - wanted) ** 2).sum()
    assert found.squared_error == pytest.approx(float(change), rel=1e-5)
    assert found.squared_norm == pytest.approx(float((wanted**2).sum()), rel=1e-5)
    assert (
        0.085 < math.sqrt(found.squared_error / found.squared_norm) < 0.105
    )  # round to nearest on bell-shaped weights


def test_zero_blocks_stay_zero_beside_others() -> None:
    weights = torch.zeros((4, 48))
    weights[1, 16:32] = torch.linspace(-3, 3, 16)
    found, scale = coded(weights)
    back = read_back(found, scale)
    assert (back[weights.numpy() == 0] == 0).all()
    assert found.packed[0].eq(0).all()
    assert found.scales.float()[0].eq(1).all()


def test_global_scale_and_its_reciprocal_say_the_same() -> None:
    for largest in torch.rand(2000, generator=torch.Generator().manual_seed(2)).tolist():
        scale = np.float32(global_scale(largest + 1e-6))
        other = np.float32(1) / scale
        assert np.float32(1) / other == scale
        assert scale == pytest.approx(RANGE / (largest + 1e-6), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        global_scale(bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitudes_are_in_the_order_of_the_numbers(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 2.0**-20, -1.0, 1.5, -1000.0, math.inf, -math.nan]).to(dtype)
    found = magnitudes(values)
    assert found.diff().ge(0).all()
    assert torch.equal(found.view(dtype)[:-1], values.abs()[:-1])
    assert found.amax().view(dtype).isnan()


def test_zero_tensors_have_a_plain_scale() -> None:
    assert global_scale(0.0) == RANGE
    found, scale = coded(torch.zeros((2, 32)))
    assert (read_back(found, scale) == 0).all()
