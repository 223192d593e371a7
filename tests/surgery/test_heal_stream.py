"""The sequential pass on tiny checkpoints: against a plain computation, on held-out text, killed, and refused."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.surgery.heal_demo import head_plan, make_corpus

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, GemcutError, UsageError
from gemcut.records.heal import HEAL_FILE, HealTarget, load_heal
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import StreamedModel
from gemcut.surgery.heal.settings import FIT, HELD_OUT, INNER, HealSettings, jobs_of, split_items
from gemcut.surgery.heal.stream import heal
from gemcut.types import Plan
from stopping import Stop, contents, stop_at
from tiny import make_tiny

DROP = {0: (1,), 1: (0, 3), 2: (2,), 4: (1,), 5: (3,)}  # layer 3 stays whole; layer 5 is a full-attention layer
SETTINGS = HealSettings(dtype="float32", batch_tokens=256)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("heal") / "dense", "dense"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus()


@pytest.fixture(scope="module")
def plan(base: Checkpoint) -> Plan:
    return head_plan(base, DROP)


@pytest.fixture(scope="module")
def whole(base: Checkpoint, plan: Plan, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "heal"
    heal(base, plan, corpus, out, settings=SETTINGS)
    return out


def healed_weight(folder: Path, layer: int) -> torch.Tensor:
    (weight,) = load_file(folder / f"layer-{layer:03d}.safetensors").values()
    return weight


# ---------------------------------------------------------------- what comes out


def test_every_layer_beats_the_cut_alone_on_text_it_has_not_seen(whole: Path, plan: Plan, corpus: Corpus) -> None:
    report = load_heal(whole / HEAL_FILE)
    assert [one.layer for one in report.layers] == sorted(DROP)
    for one in report.layers:
        assert one.used
        assert one.held_out_after < one.held_out_before
        assert one.fit_after < one.fit_before
        assert one.kept == plan.layers[one.layer].keep
        assert one.samples + one.held_out_samples == corpus.tokens
        assert one.held_out_samples > 0
        assert one.ridge in SETTINGS.ridges
        assert set(map(float, one.ridge_residuals)) == set(SETTINGS.ridges)
        assert 1 < one.condition < 1e9
        assert one.lam > 0
    assert report.layers[0].held_out_uncut == 0  # nothing before it has changed
    assert report.used == tuple(sorted(DROP))
    assert report.items == 48
    assert report.held_out_items == 6
    assert {p.name for p in whole.iterdir()} == {HEAL_FILE, *(f"layer-{layer:03d}.safetensors" for layer in DROP)}


def test_held_out_residuals_by_class_add_up(whole: Path, corpus: Corpus) -> None:
    """Σ of errors over classes is that of the layer; every class of the held-out items is there."""
    part = split_items(corpus, SETTINGS)
    held_out = [row for row, p in zip(corpus.items, part, strict=True) if p == HELD_OUT]
    for one in load_heal(whole / HEAL_FILE).layers:
        tokens = {cls: sum(len(row.ids) for row in held_out if row.cls == cls) for cls in corpus.classes}
        assert {cls: found.samples for cls, found in one.by_class.items()} == tokens
        for whole_of, of_class in ((one.held_out_before, "before"), (one.held_out_after, "after")):
            residuals = [getattr(found, of_class) for found in one.by_class.values()]
            assert min(residuals) < whole_of < max(residuals)


def test_healed_tensors_have_the_stored_form_and_zeros_where_heads_went(whole: Path, base: Checkpoint) -> None:
    for one in load_heal(whole / HEAL_FILE).layers:
        weight = healed_weight(whole, one.layer)
        assert list(weight.shape) == list(base.ref(one.tensor).shape)
        assert weight.dtype == torch.bfloat16
        heads = weight.reshape(len(weight), one.units, one.head_dim)
        assert not heads[:, list(one.dropped)].any()
        assert heads[:, list(one.kept)].abs().sum() > 0
        stored = torch.from_numpy(base.read(one.tensor).copy()).view(torch.bfloat16).reshape(weight.shape)
        assert not torch.equal(weight[:, : one.head_dim], stored[:, : one.head_dim]) or 0 in one.dropped


def plain_heal(base: Checkpoint, plan: Plan, corpus: Corpus, ridge: float, target: str) -> dict[int, torch.Tensor]:
    """The sequential heal again, item by item, whole model in memory, explicit least squares before the norm; float32.

    There the target is y + rms(y)·(r − r̂)/γ, and every row of weights is a problem of its own.
    """
    part = split_items(corpus, dataclasses.replace(SETTINGS, ridges=(ridge,)))
    jobs = jobs_of(base, plan)
    out = {}
    with StreamedModel.open(base, dtype="float32") as model:
        dense = [model.embed(torch.from_numpy(row.ids.copy())[None]) for row in corpus.items]
        cut = list(dense)
        eps = float(model.config.rms_norm_eps)
        for i in range(model.n_layers):
            with model.layer(i) as layer:
                linear = layer.self_attn.o_proj
                seen: list[tuple[torch.Tensor, torch.Tensor]] = []
                hook = linear.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0][0], y[0])))
                drift = [(a[0] - b[0]).double() for a, b in zip(dense, cut, strict=True)]
                dense = [model.run_layer(layer, h) for h in dense]
                before = list(cut)
                cut = [model.run_layer(layer, h) for h in cut]
                hook.remove()
                if (job := jobs.get(i)) is None:
                    continue
                columns = torch.from_numpy(job.columns)
                rows = [k for k, p in enumerate(part) if p == FIT]
                y = torch.cat([seen[k][1] for k in rows]).double()
                x = torch.cat([seen[len(dense) + k][0] for k in rows])[:, columns].double()
                rms = (y.square().mean(-1, keepdim=True) + eps).sqrt()
                if target == "stream":
                    y = y + rms * torch.cat([drift[k] for k in rows]) / layer.post_attention_layernorm.weight.double()
                x = x / rms
                lam = ridge * float((x.t() @ x).trace()) / len(columns)
                start = linear.weight[:, columns].double()
                tall = torch.cat([x, lam**0.5 * torch.eye(len(columns), dtype=torch.float64)])
                goal = torch.cat([y / rms, lam**0.5 * start.t()])
                new = torch.zeros_like(linear.weight)
                new[:, columns] = torch.linalg.lstsq(tall, goal).solution.t().to(torch.bfloat16).float()
                out[i] = new
                with torch.no_grad():
                    linear.weight.copy_(new)
                cut = [model.run_layer(layer, h) for h in before]
    return out


@pytest.mark.parametrize("target", ["stream", "branch"])
def test_the_stream_is_the_plain_computation(
    base: Checkpoint, plan: Plan, corpus: Corpus, tmp_path: Path, target: HealTarget
) -> None:
    settings = dataclasses.replace(SETTINGS, ridges=(1.0,), target=target)
    report = heal(base, plan, corpus, tmp_path / "out", settings=settings)
    assert all(one.used for one in report.layers)
    for layer, wanted in plain_heal(base, plan, corpus, 1.0, target).items():
        got = healed_weight(tmp_path / "out", layer).float()
        assert float((got - wanted).norm() / wanted.norm()) < 2e-3  # both rounded to bfloat16 from all but equal sums


def test_local_equals_sequential_in_the_first_layer_and_nowhere_else(
    base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    heal(base, plan, corpus, tmp_path / "local", settings=dataclasses.replace(SETTINGS, method="local"))
    assert torch.equal(healed_weight(tmp_path / "local", 0), healed_weight(whole, 0))
    local, report = (load_heal(folder / HEAL_FILE) for folder in (tmp_path / "local", whole))
    assert dataclasses.replace(local.layers[0]) == report.layers[0]
    for a, b in zip(local.layers[1:], report.layers[1:], strict=True):
        assert a.held_out_before != b.held_out_before
    assert local.fingerprint != report.fingerprint


def test_same_bytes_again_and_a_finished_heal_is_not_repeated(
    base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    report = heal(base, plan, corpus, tmp_path / "again", settings=SETTINGS)
    assert contents(tmp_path / "again") == contents(whole)
    assert heal(base, plan, corpus, tmp_path / "again", settings=SETTINGS, progress=stop_at("layer 0")) == report


def test_a_heal_that_helps_nowhere_is_not_used(base: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    """So large a ridge that the weights round to what they were: no better than no heal."""
    settings = dataclasses.replace(SETTINGS, ridges=(1e9,))
    report = heal(base, head_plan(base, {0: (1,), 2: (0,)}), corpus, tmp_path / "out", settings=settings)
    assert [one.used for one in report.layers] == [False, False]
    assert [one.file for one in report.layers] == [None, None]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [HEAL_FILE]
    assert load_heal(tmp_path / "out" / HEAL_FILE) == report


def test_heal_all_refits_whole_layers_behind_the_first_cut(
    base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    report = heal(base, plan, corpus, tmp_path / "out", settings=dataclasses.replace(SETTINGS, heal_all=True))
    assert [one.layer for one in report.layers] == [0, 1, 2, 3, 4, 5]
    assert report.layers[3].dropped == ()
    assert report.layers[3].held_out_before > 0  # its inputs are no longer the dense model's
    assert report.layers[3].held_out_before == pytest.approx(report.layers[3].held_out_uncut, rel=1e-4)  # it is whole
    assert report.layers[2].held_out_before != pytest.approx(report.layers[2].held_out_uncut, rel=1e-4)
    before = {one.layer: one for one in load_heal(whole / HEAL_FILE).layers}
    assert report.layers[2] == before[2]


def test_a_mixture_of_experts_heals_too(corpus: Corpus, tmp_path: Path) -> None:
    moe = open_checkpoint(make_tiny(tmp_path / "moe", "moe"))
    report = heal(moe, head_plan(moe, {1: (2,), 5: (0,)}), corpus, tmp_path / "out", settings=SETTINGS)
    assert report.used == (1, 5)
    assert report.layers[0].ridge_residuals


# ---------------------------------------------------------------- split and guards


def test_every_eighth_item_of_every_class_is_held_out(corpus: Corpus) -> None:
    part = split_items(corpus, SETTINGS)
    for cls in corpus.classes:
        of_class = [int(p) for p, row in zip(part, corpus.items, strict=True) if row.cls == cls]
        assert of_class == [FIT, FIT, FIT, INNER, FIT, FIT, FIT, HELD_OUT] * 2
    assert INNER not in split_items(corpus, dataclasses.replace(SETTINGS, ridges=(1.0,)))
    with pytest.raises(UsageError, match="too few items"):
        split_items(make_corpus(7), SETTINGS)


def test_too_few_tokens_are_refused_before_anything_runs(base: Checkpoint, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 384 tokens, 4 for each column") as caught:
        heal(base, plan, make_corpus(12), tmp_path / "out", settings=SETTINGS)
    assert "layer 5: 96 kept columns" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"ridges": ()}, {"ridges": (0.0,)}, {"ridges": (1.0, 1.0)}, {"ridges": (float("nan"),)}, {"method": "global"},
     {"target": "output"}, {"every": 2}, {"batch_tokens": 0}, {"method": "local", "heal_all": True}],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        HealSettings(**wrong)  # type: ignore[arg-type]


def test_plans_that_cannot_be_healed(base: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drops no head"):
        heal(base, head_plan(base, {0: ()}), corpus, tmp_path / "out")
    other = dataclasses.replace(head_plan(base, DROP), model_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        heal(base, other, corpus, tmp_path / "out")
    with pytest.raises(UsageError, match="no experts to cut"):
        heal(base, dataclasses.replace(head_plan(base, DROP), kind="experts"), corpus, tmp_path / "out")


def test_a_weight_that_is_no_number_is_named(corpus: Corpus, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "broken", "dense")
    name = "model.language_model.layers.3.self_attn.o_proj.weight"
    ref = open_checkpoint(folder).ref(name)
    with open(folder / ref.shard, "r+b") as f:
        f.seek(ref.start + 2 * 70)
        f.write(np.array([0x7FC0], np.uint16).tobytes())
    broken = open_checkpoint(folder)
    with pytest.raises(GemcutError, match=r"layer 3's self_attn\.o_proj\.weight holds NaN") as caught:
        heal(broken, head_plan(broken, DROP), corpus, tmp_path / "out", settings=SETTINGS)
    assert caught.value.exit_code == 4


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("label", ["layer 0", "layer 2", "layer 5"])
def test_a_stopped_heal_goes_on_with_the_same_bytes(
    base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path, label: str
) -> None:
    out = tmp_path / "heal"
    with pytest.raises(Stop):
        heal(base, plan, corpus, out, settings=SETTINGS, progress=stop_at(label))
    assert not out.exists()
    seen: list[str] = []
    heal(base, plan, corpus, out, settings=SETTINGS, progress=lambda done, total, said: seen.append(said))
    assert seen[0] == label  # no finished layer runs again
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    "changed",
    [{"ridges": (1e-2,)}, {"every": 6}, {"batch_tokens": 128}, {"heal_all": True}, {"method": "local"},
     {"dtype": "bfloat16"}, {"target": "branch"}],
)  # fmt: skip
def test_another_setting_is_another_heal(
    base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    other = dataclasses.replace(SETTINGS, **changed)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another model, plan, corpus or settings"):
        heal(base, plan, corpus, whole, settings=other)
    with pytest.raises(Stop):
        heal(base, plan, corpus, tmp_path / "heal", settings=SETTINGS, progress=stop_at("layer 1"))
    with pytest.raises(UsageError, match="unfinished heal of another"):
        heal(base, plan, corpus, tmp_path / "heal", settings=other)


def test_another_plan_or_corpus_is_another_heal(base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path) -> None:
    with pytest.raises(UsageError, match="another model, plan, corpus or settings"):
        heal(base, head_plan(base, {**DROP, 0: (2,)}), corpus, whole, settings=SETTINGS)
    with pytest.raises(UsageError, match="another model, plan, corpus or settings"):
        heal(base, plan, make_corpus(seed=1), whole, settings=SETTINGS)


@pytest.mark.parametrize("damage", ["dense-002.bin", "cut-002.bin", "layer-001.safetensors", "progress.json"])
def test_a_damaged_remainder_is_thrown_away(
    base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "heal"
    with pytest.raises(Stop):
        heal(base, plan, corpus, out, settings=SETTINGS, progress=stop_at("layer 2"))
    path = tmp_path / "heal.partial" / damage
    assert path.is_file()
    if damage.endswith(".bin"):
        os.truncate(path, path.stat().st_size - 1)
    elif damage.endswith(".json"):
        path.write_text("{")
    else:
        path.unlink()
    heal(base, plan, corpus, out, settings=SETTINGS)
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_killed_at_any_moment(base: Checkpoint, plan: Plan, corpus: Corpus, whole: Path, tmp_path: Path) -> None:
    """A forked process dies by SIGKILL at random moments; what is there afterwards is nothing or the whole."""
    rng = random.Random(0)
    out, began = tmp_path / "heal", time.monotonic()
    reference = tmp_path / "reference"
    heal(base, plan, corpus, reference, settings=SETTINGS)
    takes = time.monotonic() - began
    for _ in range(12):
        child = os.fork()
        if child == 0:
            heal(base, plan, corpus, out, settings=SETTINGS)
            os._exit(0)
        time.sleep(rng.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
    heal(base, plan, corpus, out, settings=SETTINGS)
    assert contents(out) == contents(whole)
