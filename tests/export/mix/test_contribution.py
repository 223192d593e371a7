from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.mix.goldens import layout
from gemcut.errors import UsageError
from gemcut.export.mix.contribution import TIERS, bands_of, contribution_of, layers_alike, tier_types
from gemcut.export.mix.sizes import file_size
from gemcut.export.mix.stock import stock_types
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.types import GgmlType


def test_thirty_layers_have_the_published_shares() -> None:
    bands = bands_of(layout("26B-A4B"), np.arange(30.0))
    assert [bands.count(i) for i in range(3)] == [1, 7, 22]
    assert bands[29] == 0
    assert set(bands[22:29]) == {1}


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 42, 60])
def test_every_number_of_layers_has_bands(layers: int) -> None:
    model = GgufLayout("gemma4", {}, (), layers, 0, 1, True)
    bands = bands_of(model, np.random.default_rng(0).random(layers))
    assert bands.count(0) == max(1, round(layers / 30))
    assert len(bands) == layers


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("case", ["31B", "26B-A4B"])
def test_a_tier_differs_from_the_plain_file_type(name: str, case: str) -> None:
    model, tier = layout(case), TIERS[name]
    contribution = np.random.default_rng(1).random(model.layers)
    types = tier_types(name.lower(), model, contribution)
    assert types != stock_types(tier.plain, model, imatrix=True)
    best = int(np.argmax(contribution))
    assert types[f"blk.{best}.ffn_gate.weight"] is tier.top
    assert types[f"blk.{int(np.argmin(contribution))}.ffn_gate.weight"] is tier.low
    assert {kind for key, kind in types.items() if "attn_k." in key} == {tier.attention}
    assert types["token_embd.weight"] is GgmlType.Q8_0
    assert types["output_norm.weight"] is GgmlType.F32


@pytest.mark.parametrize("wider", [False, True])
def test_a_tier_weighs_the_same_on_any_layers_only_where_they_are_alike(wider: bool) -> None:
    model = layout("31B")
    rows = [4 if wider and t.name == "blk.3.ffn_up.weight" else 1 for t in model.tensors]
    tensors = [replace(t, shape=(t.shape[0] * n, *t.shape[1:])) for t, n in zip(model.tensors, rows, strict=True)]
    model = replace(model, tensors=tuple(tensors))
    orders = (np.arange(60.0), -np.arange(60.0))
    sizes = [file_size(0, tier_types("CD-Q3_K_M", model, order), model).size_bytes for order in orders]
    assert (sizes[0] == sizes[1]) is layers_alike(model) is not wider


def test_a_tier_that_is_the_plain_file_type_is_refused() -> None:
    tensors = (GgufTensor("blk.0.ffn_up.weight", (64, 64), None), GgufTensor("token_embd.weight", (64, 64), None))
    model = GgufLayout("gemma4", {}, tensors, 1, 0, 1, True)
    with pytest.raises(UsageError, match="under another name"):
        tier_types("CD-Q2_K", model, [1.0])


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0], [1.0, np.nan], [1.0, 2.0, 3.0]])
def test_contributions_that_rank_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(UsageError):
        bands_of(GgufLayout("gemma4", {}, (), 2, 0, 1, True), values)


def test_no_such_tier() -> None:
    with pytest.raises(UsageError, match="no such ContribDynamic tier"):
        tier_types("CD-Q9_K", layout("31B"), np.arange(60.0))


def test_growth_with_depth_and_scale_of_a_role_say_nothing() -> None:
    model = layout("31B")
    rng = np.random.default_rng(2)
    energies = {t.name: float(rng.uniform(1, 2)) for t in model.tensors if t.name.startswith("blk.")}
    grown = {
        name: value * (1e4 if "ffn_down" in name else 1) * float(np.exp(0.3 * int(name.split(".")[1])))
        for name, value in energies.items()
    }
    first, second = contribution_of(model, energies), contribution_of(model, grown)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert np.ptp(first) > 0.1


def test_a_loud_layer_is_found_at_any_depth() -> None:
    model = layout("31B")
    for loud in (3, 30, 57):
        energies = {t.name: 1.5 if f"blk.{loud}." in t.name else 1.0 for t in model.tensors}
        assert int(np.argmax(contribution_of(model, energies))) == loud


def test_a_layer_without_statistics_is_refused() -> None:
    model = layout("31B")
    energies = {t.name: 1.0 for t in model.tensors if "blk.7." not in t.name}
    with pytest.raises(UsageError, match="no statistics") as refused:
        contribution_of(model, energies)
    assert refused.value.where == "layer 7"
