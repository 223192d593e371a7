from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from export.mix.goldens import layout
from gemcut.errors import UsageError
from gemcut.export.mix.shapes import quantisable
from gemcut.export.mix.sizes import file_size, stored_bytes
from gemcut.export.mix.solver import solve
from gemcut.export.mix.stock import stock_types
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.types import BLOCKS, GgmlType, fits

KINDS = (
    GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.IQ4_XS, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.Q4_0,
    GgmlType.Q5_0, GgmlType.Q8_0,
)  # fmt: skip


def damages(model: GgufLayout, seed: int = 0) -> dict[tuple[str, GgmlType], float]:
    """Four times less for every bit, with a sensitivity by tensor and a little noise."""
    rng = np.random.default_rng(seed)
    out = {}
    for tensor in model.tensors:
        if quantisable(tensor):
            weight = float(np.exp(rng.normal()) * np.prod(tensor.shape))
            for kind in KINDS:
                if fits(kind, tensor.shape[-1]):
                    bits = 8 * BLOCKS[kind].size_bytes / BLOCKS[kind].values
                    out[tensor.name, kind] = weight * 4.0**-bits * float(rng.uniform(0.9, 1.1))
    return out


@pytest.mark.parametrize("case", ["31B", "26B-A4B"])
@pytest.mark.parametrize("gib", [11.0, 13.5, 17.0, 22.0])
def test_lands_within_half_a_percent_under_the_budget(case: str, gib: float) -> None:
    model, budget = layout(case), int(gib * 2**30)
    solution = solve(model, damages(model), budget, header_bytes=1 << 20)
    assert 0.995 * budget < solution.size_bytes <= budget
    assert solution.size_bytes == file_size(1 << 20, solution.types, model).size_bytes
    assert solution.least_bytes < budget < solution.most_bytes
    assert solution.price > 0


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_better_on_small_models(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 40, 5)
    tensors = tuple(GgufTensor(f"blk.{i}.attn_q.weight", (32 * int(n), 256), None) for i, n in enumerate(rows))
    model = GgufLayout("gemma4", {}, tensors, 5, 0, 1, True)
    damage = damages(model, seed)
    kinds = KINDS[:5]
    damage = {key: value for key, value in damage.items() if key[1] in kinds}
    sizes = {(t.name, k): stored_bytes(k, t) for t in tensors for k in kinds}
    least = sum(min(sizes[t.name, k] for k in kinds) for t in tensors)
    budget = int(least * rng.uniform(1.0, 1.8))
    best = min(
        sum(damage[t.name, k] for t, k in zip(tensors, chosen, strict=True))
        for chosen in product(kinds, repeat=5)
        if sum(sizes[t.name, k] for t, k in zip(tensors, chosen, strict=True)) <= budget
    )
    found = solve(model, damage, budget)
    assert found.size_bytes <= budget
    assert best <= found.damage <= 1.05 * best


def test_beats_the_stock_mix_at_its_size_in_its_own_unit() -> None:
    model = layout("31B")
    damage = damages(model)
    stock = stock_types("Q4_K_M", model, imatrix=True)
    size = file_size(0, stock, model).size_bytes
    solution = solve(model, damage, size)
    assert solution.damage < sum(damage[name, kind] for name, kind in stock.items() if (name, kind) in damage)


def test_too_small_a_budget_says_the_least() -> None:
    model = layout("31B")
    damage = damages(model)
    with pytest.raises(UsageError, match="no mix of these types is so small") as refused:
        solve(model, damage, 1 << 30)
    least = int(str(refused.value.wanted).split()[2])
    assert solve(model, damage, least).size_bytes == least
    with pytest.raises(UsageError):
        solve(model, damage, least - 1)
    assert "importance matrix" in str(refused.value.hint)
    damage |= {(name, GgmlType.IQ2_XXS): 1e9 for name, _ in damage}  # there is one
    with pytest.raises(UsageError, match="no mix") as refused:
        solve(model, damage, 1 << 30)
    assert "importance matrix" not in str(refused.value.hint)


def test_a_budget_for_everything_takes_the_best_types() -> None:
    model = layout("demo dense")
    solution = solve(model, damages(model), 1 << 40)
    assert solution.size_bytes == solution.most_bytes
    assert solution.price == 0
    assert {solution.types[t.name] for t in model.tensors if quantisable(t)} == {GgmlType.Q8_0}


def test_what_is_decided_stays() -> None:
    model = layout("demo dense")
    fixed = {"token_embd.weight": GgmlType.Q6_K, "blk.3.attn_k.weight": GgmlType.Q8_0}
    solution = solve(model, damages(model), 5_000_000, fixed=fixed)
    assert fixed.items() <= solution.types.items()
    assert solution.types["output_norm.weight"] is GgmlType.F32


def test_a_tensor_without_damage_and_a_damage_without_number_are_refused() -> None:
    model = layout("demo dense")
    damage = damages(model)
    with pytest.raises(UsageError, match="nothing is known"):
        solve(model, {key: v for key, v in damage.items() if "blk.3.attn_k" not in key[0]}, 1 << 30)
    damage["blk.3.attn_k.weight", GgmlType.Q4_K] = float("nan")
    with pytest.raises(UsageError, match="no number"):
        solve(model, damage, 1 << 30)


def test_the_same_every_time() -> None:
    model = layout("26B-A4B")
    damage = damages(model)
    again = dict(reversed(damage.items()))
    budget = 12 << 30
    assert dict(solve(model, damage, budget).types) == dict(solve(model, again, budget).types)
