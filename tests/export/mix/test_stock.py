from __future__ import annotations

import pytest

from export.mix.goldens import BY_HAND, GOLDENS, REFUSED, layout, unfold
from gemcut.errors import UsageError
from gemcut.export.mix.overrides import parse_overrides
from gemcut.export.mix.stock import file_type, file_types, starved_of_imatrix, stock_types
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.types import GgmlType


def choose(run: str, layout: GgufLayout) -> dict[str, GgmlType]:
    overrides = parse_overrides(BY_HAND if run.endswith(" by hand") else ())
    return stock_types(run.split()[0], layout, imatrix=run.endswith(" imatrix"), overrides=overrides)


@pytest.mark.parametrize("case", GOLDENS)
def test_every_file_type_as_llama_quantize_chooses_it(case: str) -> None:
    facts, model = GOLDENS[case], layout(case)
    for run, roles in facts["types"].items():
        if roles == REFUSED:
            with pytest.raises(UsageError, match="no type stands in"):
                choose(run, model)
            continue
        said, chosen = unfold(roles, facts["layers"]), choose(run, model)
        assert {name: kind.name for name, kind in chosen.items() if name in said} == said, run
        assert {kind for name, kind in chosen.items() if name not in said} == {GgmlType.F32}, run


def test_a_run_with_importances_that_is_not_told_apart_is_the_plain_one() -> None:
    model = layout("31B")
    for name in file_types():
        if f"{name} imatrix" not in GOLDENS["31B"]["types"]:
            assert stock_types(name, model, imatrix=True) == stock_types(name, model, imatrix=False)


def test_goldens_cover_every_file_type() -> None:
    for facts in GOLDENS.values():
        assert set(file_types()) <= set(facts["types"])


def test_names_are_taken_in_any_case_and_by_alias() -> None:
    assert file_type("q4_k") == file_type("Q4_K_M") == file_type("Q4_K_L")
    assert file_type("IQ3_M").base is GgmlType.IQ3_S
    with pytest.raises(UsageError, match="no such file type") as refused:
        file_type("Q4_K_XXL")
    assert "Q4_K_L" in str(refused.value.wanted)
    with pytest.raises(UsageError, match="no such file type") as refused:
        file_type("")
    assert (refused.value.got, refused.value.wanted) == ("an empty name", "Q4_K_M, IQ3_M, Q8_0, …")


def test_what_is_not_float32_and_not_quantised_keeps_sixteen_bits() -> None:
    model = layout("grouped")
    extra = GgufTensor("per_layer_model_proj.weight", (64, 512), source=None)
    wide = GgufLayout("gemma4", {}, (*model.tensors, extra), model.layers, 0, model.group, model.tied)
    assert stock_types("Q4_K_M", wide, imatrix=False)[extra.name] is GgmlType.BF16
    assert stock_types("Q4_K_M", wide, imatrix=False, unquantised=GgmlType.F16)[extra.name] is GgmlType.F16


def test_a_matrix_of_one_row_is_a_vector() -> None:
    row = GgufTensor("blk.0.attn_q.weight", (1, 256), source=None)
    model = GgufLayout("gemma4", {}, (row,), 1, 0, 1, True)
    assert stock_types("Q4_K_M", model, imatrix=False)[row.name] is GgmlType.BF16


def test_an_override_takes_its_tensor_out_of_the_count() -> None:
    model = layout("31B")
    free = stock_types("Q4_K_M", model, imatrix=False)
    bound = stock_types("Q4_K_M", model, imatrix=False, overrides=parse_overrides([r"blk\.[0-3]\.attn_v=q8_0"]))
    others = [
        name for name in free if "attn_v" in name and not name.startswith(("blk.0", "blk.1.", "blk.2.", "blk.3."))
    ]
    assert [free[n] for n in others] != [bound[n] for n in others]


def test_small_types_are_starved_without_importances() -> None:
    model = layout("31B")
    assert not starved_of_imatrix("Q2_K", stock_types("Q2_K", model, imatrix=False))
    assert len(starved_of_imatrix("Q2_K_S", stock_types("Q2_K_S", model, imatrix=False))) > 300
    starved = starved_of_imatrix("IQ2_XXS", stock_types("IQ2_XXS", model, imatrix=False))
    assert starved
    assert "token_embd.weight" not in starved
