"""Dry runs of the shipped recipes that write GGUF files, on headers of the real models' shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import synthetic
from gemcut import preflight, recipe
from tiny import make_drafter, make_tokenizer, write_corpus

MOE_LAYERS = 30
SHIPPED = [name for name in recipe.shipped() if (words := recipe.load(name)).gguf and words.model.startswith("google/")]

SLOW = ("gemma4-31b-fit24", "gemma4-26b-98e")  # every type's quantiser is tried


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models as headers before holes, with the vocabulary's size but not its tokens."""
    root = tmp_path_factory.mktemp("headers")
    dense = dataclasses.replace(synthetic.DENSE_31B, vocabulary=4096)
    synthetic.write(root / "31B", layers=synthetic.DENSE_31B_LAYERS, geometry=dense, sparse=True)
    synthetic.write(root / "26B", layers=MOE_LAYERS, sparse=True)
    for name in ("31B", "26B"):
        make_tokenizer(root / name, 4096)
    make_drafter(root / "drafter", backbone=5376)
    write_corpus(root / "calibration.jsonl", 1)
    write_corpus(root / "heldout.jsonl", 2)
    return root


def estimated(place: Path, name: str, out: Path) -> preflight.Preflight:
    asked = recipe.load(name)
    assert asked.gguf is not None
    folder = place / ("31B" if "31B" in asked.model else "26B")
    sets = [
        f"model={folder}",
        f"observe.corpus={place / 'calibration.jsonl'}",
        f"kld.corpus={place / 'heldout.jsonl'}",
        "gguf.mmproj=[]",
    ]
    if asked.gguf.drafter is not None:
        sets.append(f"gguf.drafter.model={place / 'drafter'}")
    if asked.gguf.fit:
        sets.append("gguf.fit=[{memory: 24GiB, context: 32768, kv: q8_0, beside: [drafter]}]")
    return preflight.estimate(recipe.load(name, tuple(sets)), out)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SHIPPED]
)
def test_every_shipped_recipe_says_its_files_before_it_begins(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Disk and memory of this machine are not what is tested."""
    monkeypatch.setattr("gemcut.store.free_bytes", lambda path: 1 << 50)
    monkeypatch.setattr("gemcut.machine.total_bytes", lambda: 1 << 50)
    found = estimated(place, name, tmp_path)
    asked = recipe.load(name).gguf
    assert asked is not None
    wanted = [*asked.tiers, *(["Q8_0"] if asked.drafter else []), *(f"fit-{one.memory}" for one in asked.fit)]
    assert len(found.files) == len(wanted)
    for one, ending in zip(found.files, wanted, strict=True):
        assert one.name.endswith(f"-{ending}.gguf")
    stage = next(one for one in found.stages if one.name == "gguf")
    assert stage.write_bytes >= sum(one.size_bytes for one in found.files)
    assert stage.seconds is not None
    assert stage.seconds > 60, "billions of weights take a while on any machine"
    for one in found.files:
        if one.name.startswith("drafter"):
            continue
        assert 2 < one.bits_per_weight < 9, one.name
