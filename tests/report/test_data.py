"""What one report refuses to hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.report.fixture import full

from gemcut.errors import CheckpointError, UsageError
from gemcut.report import KldEntry


@pytest.mark.parametrize("field", ["corpus_hash", "template_hash", "dtype", "base_fingerprint"])
def test_candidates_of_different_protocols_are_refused(field: str) -> None:
    data = full()
    other = dataclasses.replace(data.kld[1].result, **{field: "another"})
    with pytest.raises(UsageError, match=field):
        dataclasses.replace(data, kld=(data.kld[0], KldEntry("other", other)))


def test_repeated_labels_and_unknown_choice_are_refused() -> None:
    data = full()
    with pytest.raises(UsageError, match="same label"):
        dataclasses.replace(data, kld=(data.kld[0], data.kld[0]))
    with pytest.raises(UsageError, match="not measured"):
        dataclasses.replace(data, chosen="never")


def test_arrays_of_another_plan_are_refused() -> None:
    data = full()
    with pytest.raises(CheckpointError, match="keep probabilities"):
        dataclasses.replace(data, keep_probability=np.zeros((2, 3)))
    with pytest.raises(CheckpointError, match="floor"):
        dataclasses.replace(data, protected={"floor": np.zeros((2, 3), bool)})
    with pytest.raises(CheckpointError, match="outside"):
        dataclasses.replace(data, keep_probability=np.full((12, 32), np.nan))


def test_the_only_real_candidate_needs_no_choice() -> None:
    data = full()
    floor = next(entry for entry in data.kld if entry.is_noise_floor)
    one = dataclasses.replace(data, kld=(floor, data.kld[0]), chosen=None)
    assert one.entry is data.kld[0]
    assert one.noise_floor is floor
    assert dataclasses.replace(data, chosen=None).entry is None
