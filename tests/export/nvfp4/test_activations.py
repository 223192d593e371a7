"""Scales of activations from statistics: by hand; borrowed by experts that saw too little; refused if too many did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, QualityError
from gemcut.export.nvfp4.activations import gate, observed
from observed import EVEN, groups_of, statistics
from tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("tiny") / "moe", num_hidden_layers=6))


def test_largest_input_and_mean_squares(tmp_path: Path, model: Checkpoint) -> None:
    found = observed(statistics(tmp_path / "s", model, EVEN), model)
    groups = [group for group in groups_of(model) if group.layer == 2]
    inputs = found.layer(2, groups)
    assert len(inputs) == 4 + 2 * 8  # q|k|v, o, gate|up, down, and two for every expert
    one = inputs["experts.gate_up_proj", 3]
    assert (one.largest, one.tokens, one.borrowed) == (4 * 64 * 4, 50, False)
    np.testing.assert_allclose(one.mean_squares, np.arange(1, 65) ** 2)
    assert inputs["self_attn.q_proj", 0].largest == 4 * 64
    assert gate(found, groups_of(model)) == {}


def test_an_expert_that_saw_nothing_borrows_from_its_peers(tmp_path: Path, model: Checkpoint) -> None:
    tokens = EVEN.copy()
    tokens[7] = 0
    found = observed(statistics(tmp_path / "s", model, tokens), model)
    inputs = found.layer(0, [group for group in groups_of(model) if group.layer == 0])
    poor, peer = inputs["experts.down_proj", 7], inputs["experts.down_proj", 6]
    assert poor.borrowed
    assert not peer.borrowed
    assert poor.largest == peer.largest == 4 * 32 * 7  # the loudest of those that saw enough
    np.testing.assert_allclose(poor.mean_squares, peer.mean_squares)
    borrowers = (("experts.gate_up_proj", 7), ("experts.down_proj", 7))
    assert gate(found, groups_of(model)) == dict.fromkeys(range(6), borrowers)


def test_too_many_borrowers_fail_the_gate(tmp_path: Path, model: Checkpoint) -> None:
    tokens = EVEN.copy()
    tokens[:2] = (0, 1)
    folder = statistics(tmp_path / "s", model, tokens)
    with pytest.raises(QualityError, match="cover too little") as error:
        gate(observed(folder, model), groups_of(model))
    assert error.value.where == "layer 0, experts.gate_up_proj"
    assert len(gate(observed(folder, model, max_borrowed=0.25), groups_of(model))) == 6


def test_statistics_of_nothing_fail_whatever_may_borrow(tmp_path: Path, model: Checkpoint) -> None:
    folder = statistics(tmp_path / "s", model, np.zeros(8, np.int64))
    with pytest.raises(QualityError):
        gate(observed(folder, model, max_borrowed=1.0), groups_of(model))


def test_headroom_leaves_room_above_what_was_seen(tmp_path: Path, model: Checkpoint) -> None:
    folder = statistics(tmp_path / "s", model, EVEN)
    groups = [group for group in groups_of(model) if group.layer == 1]
    plain = observed(folder, model).layer(1, groups)["mlp.gate_proj", 0].largest
    roomy = observed(folder, model, "headroom").layer(1, groups)["mlp.gate_proj", 0].largest
    quiet = np.quantile([16, 32, 48, 64], 0.01)  # √E[a²] of each block's loudest column
    assert roomy == pytest.approx(16384 * quiet)
    assert roomy > plain
    assert 448 * quiet / roomy > 2**-6


def test_statistics_of_another_model_are_refused(tmp_path: Path, model: Checkpoint) -> None:
    folder = statistics(tmp_path / "s", model, EVEN, fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        observed(folder, model)


def test_sums_of_another_shape_are_refused(tmp_path: Path, model: Checkpoint) -> None:
    folder = statistics(tmp_path / "s", model, EVEN[:4])
    with pytest.raises(CheckpointError, match="another shape"):
        gate(observed(folder, model), groups_of(model))
