"""Importances of a cut model: those of what stays, as they were."""

from __future__ import annotations

import numpy as np
import pytest

from gemcut.errors import CheckpointError
from gemcut.export.imatrix import Entry, Imatrix, take
from gemcut.export.imatrix.entries import Inputs
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.types import Mask, Take

FUSED, OUTPUT, QUERY = "blk.0.ffn_down_exps.weight", "blk.0.attn_output.weight", "blk.0.attn_q.weight"
LAYOUT = GgufLayout(
    "gemma4",
    {},
    (
        GgufTensor(FUSED, (4, 6, 8), "down", layer=0, role="ffn_down_exps"),
        GgufTensor(OUTPUT, (6, 8), "o", layer=0, role="attn_output"),
        GgufTensor(QUERY, (8, 6), "q", layer=0, role="attn_q"),
    ),
    1,
    4,
    2,
    True,
)


def made() -> Imatrix:
    rng = np.random.default_rng(0)
    entries = {
        FUSED: Entry(rng.random((4, 8), np.float32), np.array([70, 3, 90, 66])),
        OUTPUT: Entry(rng.random((1, 8), np.float32), np.array([9])),
        QUERY: Entry(rng.random((1, 6), np.float32), np.array([9])),
    }
    inputs = {name: Inputs(-one.sums, one.sums * 2) for name, one in entries.items()}
    return Imatrix(
        entries, prior_tokens=64, starved={FUSED: (0, 3)}, inputs=inputs, roundings=4, model_fingerprint="f" * 64
    )


def test_experts_and_columns_leave_and_rows_change_nothing() -> None:
    before = made()
    after = take(before, LAYOUT, {"down": Take(0, (1, 3)), "o": Take(1, (0, 1, 6)), "q": Take(0, (0, 1, 2, 3))})
    for unit, was in enumerate((1, 3)):
        assert np.array_equal(after.importance(FUSED, unit), before.importance(FUSED, was))  # type: ignore[arg-type]
        assert np.array_equal(after.inputs[FUSED].mean[unit], before.inputs[FUSED].mean[was])
        assert np.array_equal(after.inputs[FUSED].spread[unit], before.inputs[FUSED].spread[was])
    assert after.tokens(FUSED).tolist() == [3, 2]
    assert after.starved == {FUSED: (1,)}
    assert np.array_equal(after.entries[OUTPUT].sums, before.entries[OUTPUT].sums[:, [0, 1, 6]])
    assert np.array_equal(after.inputs[OUTPUT].mean, before.inputs[OUTPUT].mean[:, [0, 1, 6]])
    assert after.entries[QUERY] is not None
    assert np.array_equal(after.entries[QUERY].sums, before.entries[QUERY].sums)
    assert (after.roundings, after.model_fingerprint) == (4, "")  # nobody knows the fingerprint of the cut folder here


def test_a_mask_takes_nothing() -> None:
    before = made()
    after = take(before, LAYOUT, {"o": Mask(1, (0, 1)), "q": Mask(0, (3,))})
    assert np.array_equal(after.entries[OUTPUT].sums, before.entries[OUTPUT].sums)
    assert after.starved == before.starved


def test_importances_of_another_model() -> None:
    smaller = take(made(), LAYOUT, {"down": Take(0, (1, 3))})
    with pytest.raises(CheckpointError, match="another model"):
        take(smaller, LAYOUT, {"down": Take(0, (1, 3))})
