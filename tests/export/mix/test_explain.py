from __future__ import annotations

from dataclasses import replace

import pytest

from export.mix.goldens import layout
from gemcut.export.mix.explain import bands, choices
from gemcut.export.mix.sizes import file_size
from gemcut.export.mix.stock import stock_types
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import GgmlType


def placed(case: str) -> GgufLayout:
    """A golden layout with the layers that a family says."""
    model = layout(case)
    layers = [int(t.name.split(".")[1]) if t.name.startswith("blk.") else None for t in model.tensors]
    return replace(model, tensors=tuple(replace(t, layer=i) for t, i in zip(model.tensors, layers, strict=True)))


@pytest.mark.parametrize("case", ["31B", "26B-A4B", "demo dense"])
def test_nothing_is_lost_between_tensors_and_bands(case: str) -> None:
    model = placed(case)
    types = stock_types("Q4_K_M", model, imatrix=True)
    damage = dict.fromkeys(types.items(), 0.001)
    each, found = choices(model, types, damage), bands(model, types, damage)
    assert sum(band.size_bytes for band in found) == sum(one.size_bytes for one in each)
    assert sum(count for band in found for _, count in band.types) == len(each)
    assert sum(band.damage for band in found) == pytest.approx(0.001 * len(each))
    assert sum(one.elements for one in each) < file_size(0, types, model).elements  # norms are no choice


def test_bands_follow_the_layers_and_the_heaviest_comes_first() -> None:
    model = placed("26B-A4B")
    types = stock_types("IQ2_M", model, imatrix=True)
    found = bands(model, types, {})
    assert found[0].role == "ffn_gate_up_exps"
    experts = [band for band in found if band.role == "ffn_down_exps"]
    assert [band.layers for band in experts] == [(0, 7), (8, 15), (16, 23), (24, 29)]
    assert {band.bpw for band in experts} == {4.5}
    assert experts[0].types == ((GgmlType.IQ4_NL, 8),)
    (embedding,) = [band for band in found if band.role == "token_embd"]
    assert (embedding.layers, embedding.damage) == (None, 0.0)


def test_a_damage_that_nobody_measured_is_not_made_up() -> None:
    model = placed("demo dense")
    types = stock_types("Q4_K_M", model, imatrix=True)
    assert {one.damage for one in choices(model, types, {})} == {None}
