"""Recipes about heads on the trained dense checkpoint: plan, heal, canary, salvage, report, and what a gate leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcut import pipeline, recipe
from gemcut.checkpoint import open_checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.records import load_kld, load_manifest
from gemcut.records.canary import load_canary
from tiny import make_tiny, write_corpus

SMALL = ("observe.max_tokens=9000", "kld.max_tokens=3000", "canary.max_new_tokens=8")


def words(*sets: str) -> recipe.Recipe:
    return recipe.load("demo-heads", (*SMALL, *sets))


def names(run: pipeline.Run, *, reused: bool) -> list[str]:
    return [stage.folder.name.rsplit("-", 1)[0] for stage in run.done if stage.reused is reused]


def changed_layers(model: Path) -> dict[str, set[int]]:
    out: dict[str, set[int]] = {}
    for fact in load_manifest(model / "manifest.json").tensors:
        if fact.found != "same":
            layer = next(int(part) for part in fact.name.split(".") if part.isdigit())
            out.setdefault(fact.name.split(".")[-2], set()).add(layer)
    return out


@pytest.mark.slow
def test_the_recipe_of_card_000_in_small(tmp_path: Path) -> None:
    """Plan, heal, cut, verify, canary, kld, report; a second run keeps everything; the card prints its tables."""
    loose = ("canary.newly_broken=1.0", "heal.max_tokens=9000")
    run = pipeline.run(words(*loose), tmp_path)
    assert names(run, reused=False) == ["observe", "plan-obs", "heal", "cut", "verify", "canary", "kld"]
    assert run.model is not None
    layers = set(range(12))
    heal = json.loads(next(tmp_path.glob("demo-heads/heal-*/healed/heal.json")).read_text())
    used = {one["layer"] for one in heal["layers"] if one["used"]}
    assert len(used) >= 9, "the heal wins nearly everywhere"
    assert changed_layers(run.model) == {"q_proj": layers, "o_proj": layers}
    card = (tmp_path / "demo-heads" / "report" / "README.md").read_text()
    for text in ("| Layers changed | Unchanged |", "0–11 (12)", "### Heal, layer by layer", "### Canary", "SHA256SUMS"):
        assert text in card, text
    again = pipeline.run(words(*loose), tmp_path)
    assert names(again, reused=False) == []
    plain = pipeline.run(recipe.parse(recipe.resolved(words(*loose)), "plain", ("heal=null",)), tmp_path)
    assert names(plain, reused=False) == ["cut", "verify", "canary", "kld"]

    def mean(one: pipeline.Run) -> float:
        result = load_kld(next(s for s in one.done if s.name == "kld").folder / "kld-obs.json")
        return next(row for row in result.rows if row.cls == "all").mean.value

    assert mean(run) < 0.6 * mean(plain)


@pytest.mark.slow
def test_layers_that_fail_the_canary_get_their_bytes_back(tmp_path: Path) -> None:
    """A strict canary: some of the first layers stay cut, the others and the second shard are the base's."""
    strict = (
        "score=norm",
        "plan.layers=0-3",
        "plan.drop=3",
        "heal=null",
        "canary.newly_broken=1.0",
        "canary.nll_ratio=1.05",
    )
    run = pipeline.run(words(*strict), tmp_path)
    assert run.model is not None
    assert names(run, reused=False)[4:] == [
        "canary",
        "salvage",
        "cut-salvaged",
        "verify-salvaged",
        "canary-salvaged",
        "kld",
    ]
    search = json.loads(next(tmp_path.glob("demo-heads/salvage-*/salvage.json")).read_text())
    kept = set(search["kept_layers"])
    assert kept
    assert kept | set(search["restored_layers"]) == {0, 1, 2, 3}
    assert search["restored_layers"], "the strict canary lets everything pass"
    assert changed_layers(run.model) == {"q_proj": kept, "o_proj": kept}
    base = open_checkpoint(Path(__file__).parents[1] / "demo" / "dense")
    cut = {f".layers.{layer}." for layer in kept}
    untouched = [
        name for name, header in base.shards.items() if not any(c in t.name for t in header.tensors for c in cut)
    ]
    assert untouched, "the second shard at least"
    for name in untouched:
        assert (run.model / name).read_bytes() == (base.path / name).read_bytes()
    card = (tmp_path / "demo-heads" / "report" / "README.md").read_text()
    assert "the base's bytes" in card


@pytest.mark.slow
def test_without_salvage_the_work_is_kept(tmp_path: Path) -> None:
    strict = ("plan.layers=0-3", "plan.drop=3", "heal=null", "canary.nll_ratio=1.0", "canary.salvage=false")
    with pytest.raises(QualityError, match="fails the canary under"):
        pipeline.run(words(*strict), tmp_path)
    assert list(tmp_path.glob("demo-heads/cut-*/model/manifest.json"))
    assert list(tmp_path.glob("demo-heads/canary-*/canary.json"))
    assert not list(tmp_path.glob("demo-heads/salvage-*"))


def test_a_base_that_does_not_talk_is_blamed_itself(tmp_path: Path) -> None:
    """No search for layers to restore: no set of them can pass."""
    make_tiny(tmp_path / "base", "dense", max_position_embeddings=2048, initializer_range=0.5)  # says one letter
    tiny = recipe.build(
        {
            "name": "tiny",
            "model": str(tmp_path / "base"),
            "observe": {"corpus": str(write_corpus(tmp_path / "calibration.jsonl", 1)), "dtype": "float32"},
            "score": "random",
            "plan": {"kind": "heads", "drop": 2},
            "canary": {"max_new_tokens": 12},
        }
    )
    with pytest.raises(QualityError, match="the base itself does not talk"):
        pipeline.run(tiny, tmp_path)
    record = load_canary(next(tmp_path.glob("tiny/canary-*/canary.json")))
    assert not record.base_sound
    assert list(tmp_path.glob("tiny/cut-*/model/manifest.json")), "the work is kept"
    assert not list(tmp_path.glob("tiny/salvage-*"))


@pytest.mark.slow
def test_what_a_recipe_about_heads_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one criterion at a time"):
        pipeline.run(words("compare=[obs]"), tmp_path)
    with pytest.raises(UsageError, match="runs backwards"):
        pipeline.run(words("plan.layers=3-1"), tmp_path, until="plan")
    with pytest.raises(UsageError, match="belongs to recipes about heads"):
        pipeline.run(recipe.load("demo-moe", ("canary={}",)), tmp_path)
