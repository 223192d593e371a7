"""The refit of the down_proj of experts: its algebra, the layer it is of, and the checkpoint that comes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.surgery.heal_demo import make_corpus
from tests.surgery.test_heal_routed import KEEP, expert_plan
from transformers import AutoModelForCausalLM

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import UsageError
from gemcut.records.heal import HEAL_FILE, load_heal
from gemcut.records.results import load_manifest
from gemcut.stream.corpus import Corpus, load_corpus
from gemcut.stream.model import StreamedModel
from gemcut.surgery import cut, edits_for, verify_cut
from gemcut.surgery.heal.down import DownRows, Inner, _sweep, fit_down
from gemcut.surgery.heal.memory import heal_disk_bytes, heal_memory_bytes
from gemcut.surgery.heal.routed import Target, recorded
from gemcut.surgery.heal.settings import FIT, HELD_OUT, INNER, HealSettings, Job, jobs_of, split_items
from gemcut.surgery.heal.states import Layout
from gemcut.surgery.heal.stream import heal
from gemcut.types import Replace, Take
from stopping import Stop, contents, stop_at
from tiny import make_tiny

SETTINGS = HealSettings(dtype="float32", batch_tokens=256, experts="down_proj")
DEMO = Path(__file__).parents[2] / "demo"
H, WIDTH, EXPERTS, TOP_K, EPS = 12, 5, 4, 2, 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("down") / "moe", "moe"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(240)


@pytest.fixture(scope="module")
def whole(base: Checkpoint, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "heal"
    heal(base, expert_plan(base), corpus, out, settings=SETTINGS)
    return out


# ---------------------------------------------------------------- algebra


def routed(folder: Path, items: int = 48) -> tuple[DownRows, dict[str, torch.Tensor]]:
    """Random pairs of every token of a corpus, padding included, and all of it in plain tensors without padding."""
    corpus = make_corpus(items)
    layout = Layout.of(corpus.items, split_items(corpus, SETTINGS), 256, 512)
    rows = DownRows(layout, TOP_K, H, WIDTH, torch.float32, EPS, folder)
    g = torch.Generator().manual_seed(0)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("h", "expert", "gate", "y", "part")}
    for k, batch in enumerate(layout.batches):
        n = batch.positions
        chosen = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(n)])  # [n, k]
        gate, h = torch.rand(n, TOP_K, generator=g) + 0.2, torch.randn(n, TOP_K, WIDTH, generator=g)
        y = torch.randn(n, H, generator=g)
        order = torch.argsort(chosen.reshape(-1), stable=True)
        seen = Inner()
        seen.token, seen.expert = torch.arange(n).repeat_interleave(TOP_K)[order], chosen.reshape(-1)[order]
        seen.gate, seen.h = gate.reshape(-1)[order], h.reshape(-1, WIDTH)[order]
        rows.add(k, seen, y)
        for part in (FIT, INNER, HELD_OUT):
            at = layout.chosen(k, part)
            for name, values in (("h", h), ("expert", chosen), ("gate", gate), ("y", y)):
                kept[name].append(values[at])
            kept["part"].append(torch.full((len(at),), part))
    return rows, {name: torch.cat(parts) for name, parts in kept.items()}


def job_of(kept: tuple[int, ...]) -> Job:
    return Job(0, "experts", "experts.down_proj", EXPERTS, 1, kept, "norm", "down_proj")


def given(plain: dict[str, torch.Tensor], weight: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    """p [T, H], token by token."""
    out = torch.zeros(len(plain["h"]), H, dtype=torch.float64)
    for t in range(len(out)):
        for slot in range(TOP_K):
            if (e := int(plain["expert"][t, slot])) in kept:
                out[t] += float(plain["gate"][t, slot]) * weight[e].double() @ plain["h"][t, slot].double()
    return out


def test_each_expert_is_least_squares_behind_the_ones_before(tmp_path: Path) -> None:
    """Against numpy's lstsq on stacked rows, expert after expert, what is given computed anew each time."""
    kept = (0, 1, 3)
    rows, plain = routed(tmp_path)
    weight = torch.randn(EXPERTS, H, WIDTH, generator=torch.Generator().manual_seed(3))
    fitted = fit_down(job_of(kept), rows, weight, (0.03,))
    root = (plain["y"].double().square().mean(-1) + EPS).rsqrt()
    on = plain["part"] != HELD_OUT
    wanted = weight.clone().double()
    for expert in kept:
        mine = torch.nonzero((plain["expert"] == expert) & on[:, None])
        token, slot = mine[:, 0], mine[:, 1]
        x = plain["h"][token, slot].double() * (plain["gate"][token, slot].double() * root[token])[:, None]
        others = (plain["y"].double() - given(plain, wanted, kept))[token] * root[token, None]
        goal = others + x @ wanted[expert].t()
        lam = 0.03 * float((x * x).sum()) / WIDTH
        tall = np.concatenate([x.numpy(), lam**0.5 * np.eye(WIDTH)])
        stacked = np.concatenate([goal.numpy(), lam**0.5 * wanted[expert].numpy().T])
        wanted[expert] = torch.from_numpy(np.linalg.lstsq(tall, stacked, rcond=None)[0].T)
    found = always(job_of(kept), rows, weight.clone(), 0.03)
    torch.testing.assert_close(found[list(kept)], wanted[list(kept)], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[2], weight[2].double())
    p, y = given(plain, wanted, kept)[~on] * root[~on, None], plain["y"][~on].double() * root[~on, None]
    apart = (1 - float((p * y).sum()) ** 2 / float(p.square().sum() * y.square().sum())) ** 0.5
    assert fitted.held_out_after == pytest.approx(apart, rel=1e-5)


def always(job: Job, rows: DownRows, weight: torch.Tensor, ridge: float) -> torch.Tensor:
    """The refitted weights, whether they win or not: random targets have nothing to be found."""
    _sweep(job, rows, weight, [FIT, INNER], ridge, "")
    return weight.double()


def test_the_weights_behind_the_target_are_found(tmp_path: Path) -> None:
    """Targets that other weights of the same experts give: the refit wins on unseen text, in every class."""
    kept = (0, 1, 2, 3)
    rows, plain = routed(tmp_path, 96)
    true = torch.randn(EXPERTS, H, WIDTH, generator=torch.Generator().manual_seed(5))
    rows.restart(kept, true)
    rows.target.copy_(rows.given)
    start = true + 0.3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(6))
    fitted = fit_down(job_of(kept), rows, start, (1e-4, 1e-2))
    assert fitted.used
    assert fitted.ridge == 1e-4
    assert fitted.held_out_after < 0.6 * fitted.held_out_before
    assert all(one.after < 0.7 * one.before for one in fitted.by_class.values())
    assert sum(one.samples for one in fitted.by_class.values()) == int((plain["part"] == HELD_OUT).sum())


def test_an_expert_with_few_tokens_keeps_its_weights(tmp_path: Path) -> None:
    rows, plain = routed(tmp_path, 8)
    counts = [int(((plain["expert"] == e) & (plain["part"] != HELD_OUT)[:, None]).sum()) for e in range(EXPERTS)]
    rows._pair_expert[torch.nonzero(rows._pair_expert == 1)[3:, 0]] = 0
    weight = torch.randn(EXPERTS, H, WIDTH)
    new = always(job_of((0, 1, 2, 3)), rows, weight.clone(), 1e-2)
    assert counts[0] > 4 * WIDTH
    assert torch.equal(new[1], weight[1].double())
    assert not torch.equal(new[0], weight[0].double())


# ---------------------------------------------------------------- the pass


def test_used_layers_beat_the_cut_alone_on_unseen_text(whole: Path, base: Checkpoint, corpus: Corpus) -> None:
    report = load_heal(whole / HEAL_FILE)
    assert [one.layer for one in report.layers] == list(expert_plan(base).layers)
    assert report.used
    for one in report.layers:
        assert one.used is (one.held_out_after < one.held_out_before)
        assert one.tensor.endswith("experts.down_proj")
        assert one.samples + one.held_out_samples == corpus.tokens
        assert one.condition > 1
        assert set(one.by_class) == {"code", "math", "story"}
        if one.used:
            weight = load_file(whole / str(one.file))[one.tensor]
            assert list(weight.shape) == list(base.ref(one.tensor).shape)
            assert not weight[list(one.dropped)].any()


def test_the_residual_is_that_of_the_written_checkpoint(
    base: Checkpoint, corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    """The first layer of the cut model, read back, against the dense one on the held-out items."""
    plan = expert_plan(base)
    cut(base, plan, tmp_path / "cut", healed=whole)
    part = split_items(corpus, SETTINGS)
    held_out = [row for row, p in zip(corpus.items, part, strict=True) if p == HELD_OUT]
    sums = []
    for checkpoint in (base, open_checkpoint(tmp_path / "cut")):
        with StreamedModel.open(checkpoint, dtype="float32", experts="recording") as model, model.layer(0) as layer:
            target, eps = Target(), float(model.config.rms_norm_eps)
            rows = []
            for row in held_out:
                with recorded(layer, target):
                    model.run_layer(layer, embedded(base, row.ids))
                rows.append(target.y.double())
            sums.append(torch.cat(rows))
    root = (sums[0].square().mean(-1, keepdim=True) + eps).rsqrt()
    y, p = sums[0] * root, sums[1] * root
    apart = (1 - float((p * y).sum()) ** 2 / float(p.square().sum() * y.square().sum())) ** 0.5
    first = load_heal(whole / HEAL_FILE).layers[0]
    assert first.layer == 0
    assert first.used
    assert first.held_out_after == pytest.approx(apart, rel=1e-3)


def embedded(base: Checkpoint, ids: np.ndarray) -> torch.Tensor:
    with StreamedModel.open(base, dtype="float32", experts="recording") as model:
        return model.embed(torch.from_numpy(ids.copy())[None])


def test_only_down_proj_differs_and_stock_transformers_loads_it(base: Checkpoint, whole: Path, tmp_path: Path) -> None:
    plan = expert_plan(base)
    edits, plain = edits_for(plan, base, whole), edits_for(plan, base)
    used = {one.tensor: one for one in load_heal(whole / HEAL_FILE).layers if one.used}
    assert {name for name in edits if edits[name] != plain[name]} == used.keys()
    assert all(isinstance(edits[name], Replace) and edits[name].then == Take(0, KEEP) for name in used)
    cut(base, plan, tmp_path / "cut", healed=whole)
    verify_cut(open_checkpoint(tmp_path / "cut"), base, plan, healed=whole)
    found = {fact.name: fact.found for fact in load_manifest(tmp_path / "cut" / "manifest.json").tensors}
    assert {name for name, kind in found.items() if kind not in ("same", "take")} == used.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.bfloat16)
    loaded = {name.replace("language_model.", ""): p for name, p in model.named_parameters()}
    for name, one in used.items():
        assert torch.equal(
            loaded[name.replace("language_model.", "")], load_file(whole / str(one.file))[name][list(KEEP)]
        )


def test_a_stopped_heal_goes_on_with_the_same_bytes(
    base: Checkpoint, corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    plan = expert_plan(base)
    with pytest.raises(Stop):
        heal(base, plan, corpus, tmp_path / "heal", settings=SETTINGS, progress=stop_at("layer 3"))
    seen: list[str] = []
    heal(
        base, plan, corpus, tmp_path / "heal", settings=SETTINGS,
        progress=lambda done, total, said: seen.append(said),
    )  # fmt: skip
    assert seen[0] == "layer 3"
    assert contents(tmp_path / "heal") == contents(whole)


def test_scales_and_down_proj_are_different_heals(base: Checkpoint, corpus: Corpus, whole: Path) -> None:
    with pytest.raises(UsageError, match="another model, plan, corpus or settings"):
        heal(base, expert_plan(base), corpus, whole, settings=dataclasses.replace(SETTINGS, experts="scales"))
    with pytest.raises(UsageError, match="no such refit of experts"):
        dataclasses.replace(SETTINGS, experts="gate_up_proj")  # type: ignore[arg-type]


def test_too_few_tokens_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    inner = base.ref(next(iter(jobs_of(base, expert_plan(base), experts="down_proj").values())).tensor).shape[2]
    wanted = 4 * inner * len(KEEP) // base.family.top_k(base.text_config)
    with pytest.raises(UsageError, match=f"at least {wanted} tokens, 4 for each column of an average expert"):
        heal(base, expert_plan(base), make_corpus(8), tmp_path / "no", settings=SETTINGS)
    assert not list(tmp_path.iterdir())


def test_the_estimates_see_what_it_stores(base: Checkpoint) -> None:
    plan, scales = expert_plan(base), dataclasses.replace(SETTINGS, experts="scales")
    assert heal_memory_bytes(base, plan, SETTINGS) >= heal_memory_bytes(base, plan, scales)
    assert heal_disk_bytes(base, plan, SETTINGS, tokens=1000) > heal_disk_bytes(base, plan, scales, tokens=1000)


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path) -> None:
    """Every second expert goes, in a trained model: a layer is used exactly where it wins on unseen text."""
    base = open_checkpoint(DEMO / "moe")
    corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", base.path, max_tokens=12_000)
    plan = expert_plan(base, tuple(range(0, 32, 2)))
    report = heal(base, plan, corpus, tmp_path / "heal", settings=HealSettings(dtype="float32", experts="down_proj"))
    assert report.used
    for one in report.layers:
        assert one.used is (one.held_out_after < one.held_out_before)
