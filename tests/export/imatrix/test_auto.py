from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.export.imatrix.conftest import Observed
from tests.export.imatrix.small import layout_of

from gemcut.checkpoint.read import open_checkpoint
from gemcut.checkpoint.values import decode
from gemcut.export.imatrix import choose, from_statistics
from gemcut.export.imatrix.weights import some_rows
from gemcut.export.mix.stock import stock_types
from gemcut.ggml.quantise import dequantise, quantise
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.records.linears import load_linears
from gemcut.records.statistics import load_statistics_index

Get = Callable[[str], Observed]
DEMO = Path(__file__).parents[3] / "demo"


def test_errors_are_those_of_the_quantiser_on_the_other_half(observed: Get) -> None:
    one = observed("dense")
    types = dict.fromkeys((t.name for t in one.layout.tensors), GgmlType.Q4_0)
    choices = choose(one.folder, one.layout, one.checkpoint, types, candidates=("rms4",), prior=0)
    found = {choice.tensor: choice for choice in choices}
    tensor = next(t for t in one.layout.tensors if t.name == "blk.1.ffn_up.weight")
    sums = load_linears(one.folder, load_statistics_index(one.folder), 1)["mlp.up_proj"]
    ref = one.checkpoint.ref(str(tensor.source))
    whole = decode(ref.dtype, one.checkpoint.read(ref.name))
    assert whole is not None
    values = whole.astype(np.float32).reshape(ref.shape)
    assert sums.a1 is not None
    n, mean, second = sums.n[1, 0], sums.a1[1, 0] / sums.n[1, 0], sums.a2[1, 0] / sums.n[1, 0]
    errors = {}
    for name, seen in (("plain", sums.a2[0, 0] / sums.n[0, 0]), ("rms4", np.sqrt(sums.a4[0, 0] / sums.n[0, 0]))):
        raw = np.empty(tensor_bytes(GgmlType.Q4_0, values.shape), np.uint8)
        quantise(values, GgmlType.Q4_0, seen.astype(np.float32), raw)
        off = (values - dequantise(raw, GgmlType.Q4_0, values.shape)).astype(np.float64)
        errors[name] = n * float((off**2 @ (second - mean**2) + (off @ mean) ** 2).sum())
    assert found[tensor.name].errors["rms4"] == pytest.approx(errors["rms4"] / errors["plain"], rel=1e-4)
    assert found[tensor.name].variant == min(errors, key=errors.__getitem__)


def test_every_quantised_tensor_gets_its_best_and_the_file_follows(observed: Get) -> None:
    one = observed("moe")
    types = dict.fromkeys((t.name for t in one.layout.tensors), GgmlType.Q4_0)
    choices = choose(one.folder, one.layout, one.checkpoint, types, roundings=4, prior=0)
    assert {choice.tensor for choice in choices} == from_statistics(one.folder, one.layout).entries.keys()
    for choice in choices:
        assert choice.errors[choice.variant] == min(choice.errors.values()) <= 1
    chosen = {choice.tensor: choice.variant for choice in choices}
    picks = {choice.tensor for choice in choices if choice.picks}
    assert picks
    made = from_statistics(
        one.folder, one.layout, variant="auto", chosen=chosen, roundings=4, rounded=picks, checkpoint=one.checkpoint,
        prior=0,
    )  # fmt: skip
    assert made.inputs.keys() == picks
    same = {name: from_statistics(one.folder, one.layout, variant=name, checkpoint=one.checkpoint, prior=0)
            for name in set(chosen.values())}  # type: ignore[arg-type]  # fmt: skip
    for name, variant in chosen.items():
        np.testing.assert_array_equal(made.entries[name].sums, same[variant].entries[name].sums)


def test_types_that_are_not_quantised_are_left_out(observed: Get) -> None:
    one = observed("dense")
    types = {t.name: GgmlType.BF16 if "ffn" in t.name else GgmlType.Q4_0 for t in one.layout.tensors}
    found = choose(one.folder, one.layout, one.checkpoint, types, candidates=())
    assert found
    assert not [choice for choice in found if "ffn" in choice.tensor]


def test_some_rows_are_spread_over_every_unit(observed: Get) -> None:
    one = observed("moe")
    tensor = next(t for t in one.layout.tensors if t.name == "blk.0.ffn_gate_up_exps.weight")
    units, _, columns = tensor.shape
    parts = list(some_rows(one.checkpoint, tensor, units * 16))
    assert [part.shape for part in parts] == [(16, columns)] * units
    whole = decode("BF16", one.checkpoint.read(str(tensor.source)))
    assert whole is not None
    every = np.stack(list(some_rows(one.checkpoint, tensor, 10**9)))
    np.testing.assert_array_equal(every, whole.reshape(tensor.shape))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_picked_blocks_pay_on_a_trained_model(kind: str, tmp_path: Path) -> None:
    from gemcut.observe.run import observe
    from gemcut.stream.corpus import load_corpus

    base = open_checkpoint(DEMO / kind)
    corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", base.path, max_tokens=12_000)
    folder = observe(base, corpus, tmp_path / "s")
    layout = layout_of(base)
    types = stock_types("IQ2_M", layout, imatrix=True)
    found = choose(folder, layout, base, types, candidates=(), roundings=8, rows=512)
    shares = [choice.rounded for choice in found]
    assert np.mean(shares) < 0.95  # 0.90 measured on the whole corpus and all rows
    assert np.mean([choice.picks for choice in found]) > 0.95
