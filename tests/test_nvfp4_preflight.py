"""Dry runs of the shipped NVFP4 recipes on headers of the real models' shapes: sizes, and the command for each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import synthetic
from gemcut import preflight, recipe
from gemcut.checkpoint import open_checkpoint
from gemcut.export.nvfp4.choice import choose
from tiny import make_tokenizer, write_corpus

SHIPPED = [name for name in recipe.shipped() if recipe.load(name).nvfp4 and not name.startswith("demo")]
MOE_LAYERS, VOCABULARY = 30, 262_144
# gigabytes without a vision tower (1.1)
SIZES = {
    "gemma4-31b-nvfp4": (30, 33),
    "gemma4-31b-nvfp4a16": (17, 20),
    "gemma4-26b-nvfp4a16": (15, 18),
    "gemma4-26b-98e-nvfp4a16": (12, 14.5),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("headers")
    dense = dataclasses.replace(synthetic.DENSE_31B, vocabulary=VOCABULARY)
    synthetic.write(root / "31B", layers=synthetic.DENSE_31B_LAYERS, geometry=dense, sparse=True)
    moe = synthetic.Geometry(vocabulary=VOCABULARY)
    synthetic.write(root / "26B", layers=MOE_LAYERS, geometry=moe, sparse=True)
    for name in ("31B", "26B"):
        make_tokenizer(root / name, 4096)
    write_corpus(root / "corpus.jsonl", 1)
    return root


def asked(place: Path, name: str) -> recipe.Recipe:
    plain = recipe.load(name)
    corpus = place / "corpus.jsonl"
    folder = place / ("31B" if "31B" in plain.model else "26B")
    return recipe.load(name, (f"model={folder}", f"observe.corpus={corpus}", f"kld.corpus={corpus}"))


def test_the_sizes_are_of_what_ships() -> None:
    assert set(SIZES) == set(SHIPPED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "98e" in name else ()) for name in SHIPPED]
)
def test_every_shipped_recipe_says_its_size_before_it_begins(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Disk and memory of this machine are not what is tested."""
    monkeypatch.setattr("gemcut.store.free_bytes", lambda path: 1 << 50)
    monkeypatch.setattr("gemcut.machine.total_bytes", lambda: 1 << 50)
    found = preflight.estimate(asked(place, name), tmp_path)
    stages = {one.name: one for one in found.stages}
    assert {"observe", "nvfp4", "kld", "report"} <= set(stages)
    least, most = SIZES[name]
    assert least * 1e9 < stages["nvfp4"].write_bytes < most * 1e9


def test_card_004_quantises_180_linears_and_no_attention(place: Path) -> None:
    words = asked(place, "gemma4-31b-nvfp4").nvfp4
    assert words is not None
    choice = choose(open_checkpoint(place / "31B"), words.targets)
    modules = [matrix.module for group in choice.chosen for matrix in group.matrices]
    assert len(modules) == 180
    assert all(".mlp." in name for name in modules)
    plain = recipe.load("gemma4-31b-nvfp4").observe
    assert (plain.max_items, plain.max_tokens_per_item, plain.chat_only) == (512, 2048, True)
