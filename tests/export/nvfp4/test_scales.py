"""Chosen block scales: never worse than the plain one, as good as trying every FP8 number, and weighted where asked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gemcut.export.nvfp4.codec import GROUP, encode, global_scale
from gemcut.export.nvfp4.scales import block_scales, column_weights
from gemcut.nvfp4.choices import METHODS
from gemcut.nvfp4.decode import dequantise
from gemcut.types import F64

EVERY = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def drawn(kind: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((64, 256), generator=generator)
    if kind == "heavy":  # Student's t with 5 degrees of freedom
        squares = torch.randn((5, 64, 256), generator=generator).square().mean(0)
        normal = normal / squares.sqrt()
    if kind == "wide":  # blocks from the largest that a scale can hold to less than the smallest
        normal = normal * 2.0 ** -torch.randint(0, 24, (64, 16), generator=generator).repeat_interleave(16, dim=1)
    return (normal * 0.02).to(dtype)


def squared_errors(weights: torch.Tensor, scales: torch.Tensor, scale: float) -> F64:
    """Of every weight [R, B, 16], by the tables."""
    found = encode(weights, scales, scale)
    back = dequantise(found.packed.numpy(), found.scales.view(torch.uint8).numpy(), scale)
    change = back.astype(np.float64) - weights.double().numpy()
    return np.asarray((change**2).reshape(len(weights), -1, GROUP))


def chosen(weights: torch.Tensor, method: str, columns: torch.Tensor | None = None) -> tuple[F64, float]:
    """Squared errors under a method, and G."""
    scale = global_scale(float(weights.abs().max()))
    return squared_errors(weights, block_scales(weights, scale, method, columns), scale), scale  # type: ignore[arg-type]


def least(weights: torch.Tensor, scale: float, columns: F64 | float = 1.0) -> F64:
    """Of every block [R, B] the least error that any e4m3 number leaves."""
    shape = (len(weights), weights.shape[1] // GROUP)
    every = [(squared_errors(weights, torch.full(shape, float(s)), scale) * columns).sum(2) for s in EVERY]
    return np.asarray(np.min(every, axis=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_each_method_loses_less_than_the_one_before(kind: str, dtype: torch.dtype) -> None:
    weights = drawn(kind, dtype=dtype)
    errors = [chosen(weights, method)[0].sum(2) for method in METHODS[:3]]
    if dtype == torch.bfloat16:  # block by block: others are rounded to it for the choice
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
    plain, four, swept = (float(one.sum()) for one in errors)
    assert four < 0.92 * plain
    assert swept < 0.93 * four


@pytest.mark.parametrize("kind", ["normal", "heavy", "wide"])
def test_the_sweep_finds_what_trying_every_fp8_number_finds(kind: str) -> None:
    weights = drawn(kind, 3)[:8]
    errors, scale = chosen(weights, "sweep")
    np.testing.assert_allclose(errors.sum(2), least(weights, scale), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_of_other_types_lose_hardly_more_than_they_must(dtype: torch.dtype) -> None:
    weights = drawn("heavy", 4, dtype)[:8]
    errors, scale = chosen(weights, "sweep")
    assert errors.sum() < 1.001 * least(weights, scale).sum()


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_weighted_sweep_is_as_good_as_trying_every_fp8_number(spread: float) -> None:
    weights = drawn("normal", 6)[:16]
    squares = np.exp(spread * np.random.default_rng(7).standard_normal(256))
    matter = np.sqrt(squares).reshape(1, -1, GROUP)
    errors, scale = chosen(weights, "weighted", column_weights(squares))
    assert (errors * matter).sum() < 1.005 * least(weights, scale, matter).sum()


def test_weights_move_the_error_to_columns_that_matter_less() -> None:
    weights = drawn("normal", 5)
    squares = np.random.default_rng(6).random(256) ** 6
    plain, _ = chosen(weights, "sweep")
    found, _ = chosen(weights, "weighted", column_weights(squares))
    matter = squares.reshape(1, -1, GROUP)
    assert (found * matter).sum() < 0.97 * (plain * matter).sum()
    assert found.sum() > plain.sum()
    even, _ = chosen(weights, "weighted", column_weights(np.full(256, 7.0)))
    assert even.sum() == pytest.approx(plain.sum(), rel=1e-4)


def test_columns_never_seen_count_alike() -> None:
    assert torch.equal(column_weights(np.zeros(32)), torch.full((32,), 256.0))


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
def test_weights_of_columns_are_exact_in_any_sum(spread: float) -> None:
    found = column_weights(np.exp(spread * np.random.default_rng(8).standard_normal(320)))
    assert torch.equal(found, found.round())
    assert found.min() >= 1
    assert found.view(-1, GROUP).sum(1).max() * 4095 < 2**24


def test_columns_keep_their_places() -> None:
    found = column_weights(np.arange(32.0))
    assert found[:16].argmax() == 15
    assert found[19] == pytest.approx(1 + 4080 * 19**0.5 / sum(i**0.5 for i in range(16, 32)), abs=1)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_threads_change_nothing(method: str) -> None:
    weights = drawn("heavy", 9)
    scale = global_scale(float(weights.abs().max()))
    columns = column_weights(np.random.default_rng(10).random(256))
    whole = block_scales(weights, scale, method, columns)  # type: ignore[arg-type]
    parts = [block_scales(part, scale, method, columns) for part in weights.split(5)]  # type: ignore[arg-type]
    assert torch.equal(whole, torch.cat(parts))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        again = block_scales(weights, scale, method, columns)  # type: ignore[arg-type]
        other = encode(weights, again, scale)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, again)
    found = encode(weights, whole, scale)
    assert torch.equal(found.packed, other.packed)
    assert found.squared_error == other.squared_error


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_faint_blocks_are_taken(method: str) -> None:
    weights = torch.zeros((2, 48), dtype=torch.bfloat16)
    weights[0, :16] = 1.0
    weights[1, 16:32] = 2.0**-60
    columns = column_weights(np.ones(48))
    scale = global_scale(1.0)
    found = block_scales(weights, scale, method, columns)  # type: ignore[arg-type]
    assert found[0, 1] == found[1, 0] == found[1, 2] == 1
    assert found[1, 1] == 2.0**-9
    assert float(squared_errors(weights, found, scale)[0].sum()) < 1e-12


@pytest.mark.parametrize("largest", [1e-29, 1.0, 1e30, 3e38])
def test_tensors_of_any_size_are_swept_alike(largest: float) -> None:
    weights = drawn("normal", 11, torch.float32)
    weights = (weights / weights.abs().max()).double()
    small, _ = chosen(weights.bfloat16(), "sweep")
    there = (weights.bfloat16().double() * largest).bfloat16()
    found, _ = chosen(there, "sweep")
    relative = found.sum() / (there.double() ** 2).sum().item()
    assert relative == pytest.approx(small.sum() / (weights**2).sum().item(), rel=0.02)


def digest() -> str:
    """Of codes and scales by every method, and of what is said of their errors."""
    drawn = np.random.default_rng(12).standard_normal((64, 256), dtype=np.float32)
    columns = column_weights(np.random.default_rng(13).random(256))
    found = hashlib.sha256()
    for dtype in (torch.bfloat16, torch.float32):
        weights = torch.from_numpy(drawn).to(dtype)
        scale = global_scale(float(weights.abs().max()))
        for method in METHODS:
            coded = encode(weights, block_scales(weights, scale, method, columns), scale)
            found.update(coded.packed.numpy().tobytes() + coded.scales.view(torch.uint8).numpy().tobytes())
            found.update(repr((coded.squared_error, coded.squared_norm)).encode())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["default", "avx2"])
def test_other_processors_write_the_same_bytes(processor: str) -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has nothing to leave away")
    command = [sys.executable, "-c", f"import {__name__} as test; print(test.digest())"]
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": processor, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()
