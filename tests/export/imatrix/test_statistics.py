from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.export.imatrix.conftest import Observed

from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.imatrix import coverage, fit, from_statistics
from gemcut.export.imatrix.weights import column_energy
from gemcut.records.linears import load_linears
from gemcut.records.statistics import load_statistics_index

Get = Callable[[str], Observed]


@pytest.mark.parametrize("kind", ["dense", "moe", "moe-text"])
def test_every_quantisable_tensor_of_the_blocks_has_an_entry(observed: Get, kind: str) -> None:
    one = observed(kind)
    found = from_statistics(one.folder, one.layout, prior=0)
    wanted = {
        t.name for t in one.layout.tensors if t.layer is not None and len(t.shape) > 1 and "ffn_gate_inp" not in t.name
    }
    assert found.entries.keys() == wanted
    assert fit(found, one.layout).entries.keys() == wanted
    assert coverage(found, one.layout).missing == ()
    tokens = load_statistics_index(one.folder).meta.tokens
    for name, entry in found.entries.items():
        if "_exps" not in name:
            assert entry.counts.tolist() == [tokens]


def test_sums_are_those_of_the_pass(observed: Get) -> None:
    one = observed("moe")
    found = from_statistics(one.folder, one.layout, prior=0)
    sums = load_linears(one.folder, load_statistics_index(one.folder), 2)
    for name, module in (
        ("attn_k", "self_attn.k_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_up", "mlp.up_proj"),
        ("ffn_gate_up_exps", "experts.gate_up_proj"), ("ffn_down_exps", "experts.down_proj"),
    ):  # fmt: skip
        entry, had = found.entries[f"blk.2.{name}.weight"], sums[module]
        n, a2 = had.n.sum(0), had.a2.sum(0)
        np.testing.assert_array_equal(entry.counts, n)
        seen = n > 0
        np.testing.assert_allclose(entry.sums[seen], a2[seen], rtol=1e-5, atol=2e-6 * a2[seen].mean())


def test_counts_say_how_often_each_expert_was_routed_to(observed: Get) -> None:
    one = observed("moe")
    found = from_statistics(one.folder, one.layout, prior=0)
    meta = load_statistics_index(one.folder).meta
    for layer in meta.layers:
        up, down = (found.entries[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate_up", "down"))
        np.testing.assert_array_equal(up.counts, down.counts)
        assert up.counts.sum() == meta.tokens * meta.top_k


@pytest.mark.parametrize("variant", ["hybrid", "rms4", "max"])
def test_variants_are_importances_with_true_counts(observed: Get, variant: str) -> None:
    one = observed("moe")
    plain = from_statistics(one.folder, one.layout, prior=0)
    found = from_statistics(one.folder, one.layout, variant=variant, checkpoint=one.checkpoint, prior=0)  # type: ignore[arg-type]
    assert found.variant == variant
    differs = 0
    for name, entry in found.entries.items():
        np.testing.assert_array_equal(entry.counts, plain.entries[name].counts)
        a, b = found.importance(name), plain.importance(name)
        assert a is not None
        assert b is not None
        differs += not np.allclose(a / a.mean(), b / b.mean(), rtol=1e-3)
    assert differs > len(found.entries) // 2


def test_weights_are_asked_for_where_they_are_needed(observed: Get) -> None:
    one = observed("dense")
    with pytest.raises(UsageError, match="looks at the weights"):
        from_statistics(one.folder, one.layout, variant="hybrid")


def test_column_energy(observed: Get) -> None:
    one = observed("moe")
    for tensor in one.layout.tensors:
        if tensor.name in ("blk.1.ffn_down_exps.weight", "blk.1.attn_q.weight"):
            assert tensor.source is not None
            ref = one.checkpoint.ref(tensor.source)
            whole = decode(ref.dtype, one.checkpoint.read(ref.name))
            assert whole is not None
            wanted = (whole.reshape(-1, *ref.shape[-2:]) ** 2).sum(1)
            np.testing.assert_allclose(column_energy(one.checkpoint, tensor), wanted, rtol=1e-6)


def test_statistics_of_another_model_are_refused(observed: Get) -> None:
    dense, moe = observed("dense"), observed("moe")
    wider = tuple(
        replace(t, shape=(t.shape[0], t.shape[1] * 2)) if t.name == "blk.3.attn_q.weight" else t
        for t in dense.layout.tensors
    )
    with pytest.raises(CheckpointError, match="another shape"):
        from_statistics(dense.folder, replace(dense.layout, tensors=wider))
    fewer = tuple(t for t in moe.layout.tensors if t.layer != 5)
    with pytest.raises(CheckpointError, match="numbers of layers"):
        from_statistics(moe.folder, replace(moe.layout, tensors=fewer))


def test_what_was_not_observed_is_listed(observed: Get) -> None:
    """A dense model's statistics under an MoE's layout: the experts have no sums."""
    dense, moe = observed("dense"), observed("moe")
    found = from_statistics(dense.folder, moe.layout)
    missing = coverage(found, moe.layout).missing
    assert sorted(missing) == sorted(t.name for t in moe.layout.tensors if "_exps.weight" in t.name)
