"""The heal on a trained model: what is gained in its first layers on text that no fit has seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.surgery.heal_demo import head_plan

from gemcut.checkpoint.read import open_checkpoint
from gemcut.stream.corpus import load_corpus
from gemcut.surgery.heal.settings import HealSettings
from gemcut.surgery.heal.stream import heal

DEMO = Path(__file__).parents[2] / "demo"


@pytest.mark.slow
def test_the_first_layers_of_the_demo_model(tmp_path: Path) -> None:
    base = open_checkpoint(DEMO / "dense")
    corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", base.path, max_tokens=12_000)
    report = heal(
        base, head_plan(base, {0: (4,), 1: (7,), 2: (5,)}), corpus, tmp_path / "heal",
        settings=HealSettings(dtype="float32"),
    )  # fmt: skip
    assert report.used == (0, 1, 2)
    for one in report.layers:
        assert one.held_out_uncut is not None
        assert one.harm < 0.75 * (one.held_out_before**2 - one.held_out_uncut**2)
        assert one.held_out_after < 1.2 * one.fit_after  # no fit to noise
