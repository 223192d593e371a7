from __future__ import annotations

from dataclasses import replace

import pytest

from export.mix.goldens import layout
from gemcut.errors import UsageError
from gemcut.export.mix.sizes import file_size, stored_bytes
from gemcut.export.mix.stock import stock_types
from gemcut.families.gguf import GgufTensor, Value
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import lay_out

GIB = 1 << 30


@pytest.mark.parametrize(
    ("case", "name", "gib"),
    [
        ("31B", "IQ2_M", 10.15),
        ("31B", "IQ4_XS", 15.57),
        ("31B", "Q4_K_M", 17.38),
        ("31B", "Q6_K", 23.45),
        ("26B-A4B", "IQ2_M", 9.65),
        ("26B-A4B", "IQ4_XS", 12.94),
        ("26B-A4B", "Q4_K_M", 15.63),
        ("26B-A4B", "Q6_K", 21.07),
        ("26B-98e", "IQ2_M", 7.64),
        ("26B-98e", "Q4_K_M", 12.31),
        ("26B-98e", "Q6_K", 16.57),
    ],
)
def test_published_sizes(case: str, name: str, gib: float) -> None:
    model = layout(case)
    size = file_size(0, stock_types(name, model, imatrix=True), model)
    routers = 4 * model.experts * 2816 * (model.layers - 1)  # the golden layout has one
    assert (size.size_bytes + routers) / GIB == pytest.approx(gib, abs=0.02)  # the rest is vocabulary and norms


def test_the_size_is_the_writers_to_the_byte() -> None:
    model = layout("demo moe")
    odd = GgufTensor("blk.0.layer_output_scale.weight", (1,), source=None)
    model = replace(model, tensors=(*model.tensors, odd))
    types = stock_types("Q3_K_M", model, imatrix=False)
    metadata = {"general.architecture": Value("str", "gemma4")}
    laid = lay_out(metadata, [(t.name, types[t.name], t.shape) for t in model.tensors])
    size = file_size(laid.data_start, types, model)
    assert size.size_bytes == laid.size_bytes
    assert size.padding_bytes == 28
    assert sum(kind.size_bytes for kind in size.kinds) == size.payload_bytes
    assert sum(kind.elements for kind in size.kinds) == size.elements


def test_bits_are_those_stored() -> None:
    model = layout("26B-A4B")
    size = file_size(0, stock_types("IQ2_M", model, imatrix=True), model)
    by_role = {kind.role: kind for kind in size.kinds}
    assert by_role["ffn_down_exps"].types == (GgmlType.IQ4_NL,)
    assert by_role["ffn_down_exps"].bpw == 4.5
    assert size.kinds[0].role == "ffn_gate_up_exps"
    assert 3.2 < size.bpw < 3.4


def test_a_type_that_does_not_fit_has_no_size() -> None:
    with pytest.raises(UsageError, match="cannot be stored"):
        stored_bytes(GgmlType.Q4_K, GgufTensor("a.weight", (4, 64), None))
