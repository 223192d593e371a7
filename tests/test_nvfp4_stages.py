"""What the words of a recipe ask the room for, and names of models for this machine and for others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemcut import nvfp4_stages, recipe
from gemcut.export.nvfp4.run import Settings


def test_words_without_a_word_are_the_rooms_defaults() -> None:
    words = recipe.nvfp4_words({"threads": 3})
    assert nvfp4_stages.settings(words) == Settings(words.scheme, threads=3)


def test_every_word_arrives() -> None:
    said: dict[str, object] = {
        "scheme": "NVFP4", "targets": "all", "scales": "minmax", "activations": "headroom", "max_borrowed": 0.5,
        "kv": "bound", "layout": "modelopt", "ignore": ["layers.0"], "narrow": "refuse", "device": "cuda", "threads": 2,
    }  # fmt: skip
    asked = nvfp4_stages.settings(recipe.nvfp4_words(said))  # type: ignore[arg-type]
    assert asked == Settings(**{**said, "ignore": ("layers.0",)})  # type: ignore[arg-type]
    assert replace(asked, scales="") != asked


@pytest.mark.parametrize(
    ("said", "observes"),
    [
        ({}, True),
        ({"scales": "weighted"}, True),
        ({"scales": "sweep"}, False),
        ({"scales": "minmax", "kv": "bound"}, False),
        ({"scales": "minmax", "kv": "calibrated"}, True),
        ({"scales": "minmax", "scheme": "NVFP4"}, True),
    ],
)
def test_what_wants_statistics(said: dict[str, str], observes: bool) -> None:
    assert recipe.nvfp4_words(dict(said)).observes is observes


def test_names_of_drafters(tmp_path: Path) -> None:
    assert nvfp4_stages.local_model("demo:moe-drafter").endswith("demo/moe-drafter")
    assert nvfp4_stages.public_model("demo:moe-drafter") == "moe-drafter"
    assert nvfp4_stages.public_model(str(tmp_path)) == tmp_path.name
    for hub in ("google/gemma-4-31B-it-assistant", "org/name@main"):
        assert nvfp4_stages.local_model(hub) == nvfp4_stages.public_model(hub) == hub
