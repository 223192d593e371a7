"""The heal of expert cuts: its algebra, the routing it sees, held-out text, and the checkpoint that comes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.surgery.heal_demo import head_plan, make_corpus
from transformers import AutoModelForCausalLM

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.records.heal import HEAL_FILE, load_heal
from gemcut.records.results import load_manifest
from gemcut.stream.corpus import Corpus, load_corpus
from gemcut.stream.model import StreamedModel
from gemcut.surgery import cut, edits_for, verify_cut
from gemcut.surgery.heal.routed import Contributions, ScaleMoments, ScaleSums, Target, dropped, recorded
from gemcut.surgery.heal.settings import HELD_OUT, HealSettings, Job, jobs_of, split_items
from gemcut.surgery.heal.solve import refit
from gemcut.surgery.heal.states import Layout
from gemcut.surgery.heal.stream import heal
from gemcut.types import LayerPlan, Plan, Replace, Take
from stopping import Stop, stop_at
from tiny import make_tiny

SETTINGS = HealSettings(dtype="float32", batch_tokens=256)
DEMO = Path(__file__).parents[2] / "demo"
KEEP = (0, 2, 3, 5, 6)


def expert_plan(base: Checkpoint, keep: tuple[int, ...] = KEEP) -> Plan:
    sites = [site for site in base.sites if site.kind == "experts"]
    gone = [unit for unit in range(sites[0].units) if unit not in keep]
    layers = {site.layer: LayerPlan(keep, dict.fromkeys(gone, "by hand")) for site in sites}
    return Plan("experts", base.fingerprint, sites[0].units, layers)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("routed") / "moe", "moe"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus()


@pytest.fixture(scope="module")
def whole(base: Checkpoint, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "heal"
    heal(base, expert_plan(base), corpus, out, settings=SETTINGS)
    return out


# ---------------------------------------------------------------- algebra


def routed_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phi [600, 2, 16], index [600, 2] of 5 experts, y [600, 16] of uneven size."""
    rng = torch.Generator().manual_seed(seed)
    phi = torch.randn(600, 2, 16, generator=rng, dtype=torch.float64)
    index = torch.stack([torch.randperm(5, generator=rng)[:2] for _ in range(600)])
    true = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.8], dtype=torch.float64)
    y = (phi * true[index][:, :, None]).sum(1) + 0.1 * torch.randn(600, 16, generator=rng, dtype=torch.float64)
    return phi, index, y * torch.rand(600, 1, generator=rng, dtype=torch.float64)


def moments_of(phi: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> ScaleMoments:
    out = ScaleMoments.zeros(1, 5)
    out.add_routed(phi, index, y, 1e-6)
    return out


def test_the_fit_is_weighted_least_squares_with_a_ridge() -> None:
    """Against numpy's lstsq on the stacked rows √w φ and √λ(s − s0)."""
    phi, index, y = routed_rows()
    start = torch.tensor([[1.0, 0.9, 1.1, 1.0, 1.2]], dtype=torch.float64)
    moments = moments_of(phi, index, y)
    found = refit(moments, start, 0.03, "")
    root = (y.square().mean(-1) + 1e-6).rsqrt()
    rows = torch.zeros(600, 16, 5, dtype=torch.float64)
    for t in range(600):
        rows[t, :, index[t]] = phi[t].T * root[t]
    a = np.concatenate([rows.reshape(-1, 5).numpy(), np.eye(5) * found.lam**0.5])
    b = np.concatenate([(y * root[:, None]).reshape(-1).numpy(), start[0].numpy() * found.lam**0.5])
    wanted = np.linalg.lstsq(a, b, rcond=None)[0]
    np.testing.assert_allclose(found.weight[0].numpy(), wanted, rtol=1e-9)
    assert moments.n == 600
    flat = rows.reshape(-1, 5) @ found.weight[0]
    target = (y * root[:, None]).reshape(-1)
    alpha = float(flat @ target / (flat @ flat))
    plain = float((alpha * flat - target).norm() / target.norm())
    assert moments.residual(found.weight) == pytest.approx(plain, rel=1e-9)


def test_a_large_ridge_gives_the_start_and_an_unused_expert_keeps_its_scale() -> None:
    phi, index, y = routed_rows()
    start = torch.tensor([[1.0, 0.9, 1.1, 1.0, 1.2]], dtype=torch.float64)
    torch.testing.assert_close(refit(moments_of(phi, index, y), start, 1e12, "").weight, start, rtol=1e-9, atol=0)
    never = refit(moments_of(phi, index % 4, y), start, 1e-3, "").weight
    assert float(never[0, 4]) == pytest.approx(1.2, rel=1e-12)
    assert abs(float(never[0, 0]) - 1.0) > 0.1


def test_a_common_factor_is_no_gain() -> None:
    moments = moments_of(*routed_rows())
    scales = torch.tensor([[0.7, 1.0, 1.3, 1.0, 0.9]], dtype=torch.float64)
    assert moments.residual(scales) == pytest.approx(moments.residual(3 * scales), rel=1e-9)
    assert moments.residual(scales) > moments.residual(refit(moments, scales, 1e-4, "").weight)


# ---------------------------------------------------------------- what the layer shows


def look(base: Checkpoint, job: Job, layout: Layout) -> tuple[ScaleSums, torch.Tensor, list[torch.Tensor]]:
    """Layer 0's sums over the corpus with dense inputs; its stored scales; largest |φ summed − y| of each batch."""
    gaps = []
    with StreamedModel.open(base, dtype="float32", experts="recording") as model:
        sums = ScaleSums(job, layout, float(model.config.rms_norm_eps), model.device)
        hidden = [model.embed(layout.ids(k)) for k in range(len(layout.batches))]
        with model.layer(0) as layer:
            start = layer.router.per_expert_scale.detach().clone().double()
            for k, h in enumerate(hidden):
                target, seen = Target(), Contributions()
                with recorded(layer, target):
                    model.run_layer(layer, h)
                with dropped(job, layer), recorded(layer, seen):
                    model.run_layer(layer, h)
                sums.add(k, seen, target.y)
                gaps.append(((seen.phi * start[seen.expert][:, :, None]).sum(1) - target.y).abs().max())
    return sums, start, gaps


def test_where_nothing_is_dropped_nothing_changes(base: Checkpoint, corpus: Corpus) -> None:
    plan = expert_plan(base)
    job = dataclasses.replace(jobs_of(base, plan)[0], kept=tuple(range(plan.units)))
    layout = Layout.of(corpus.items, split_items(corpus, SETTINGS), 256, 512)
    sums, start, gaps = look(base, job, layout)
    assert max(map(float, gaps)) < 1e-5
    fitted = sums.finish(job, start, torch.float32, SETTINGS)
    torch.testing.assert_close(fitted.weight.double(), start, rtol=1e-5, atol=0)
    assert fitted.held_out_before < 1e-5


def test_the_masked_layer_is_the_layer_of_the_cut_checkpoint(base: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    plan = expert_plan(base)
    cut(base, plan, tmp_path / "cut")
    job, ids = jobs_of(base, plan)[0], torch.from_numpy(corpus.items[1].ids.copy())[None]
    outputs = []
    for checkpoint in (open_checkpoint(tmp_path / "cut"), base):
        with StreamedModel.open(checkpoint, dtype="float32", experts="recording") as model:
            hidden = model.embed(ids)
            with model.layer(0) as layer:
                whole = model.run_layer(layer, hidden)
                if checkpoint is base:
                    scales = layer.router.per_expert_scale.detach().clone()
                    with dropped(job, layer, scales):
                        outputs.append(model.run_layer(layer, hidden))
                    assert torch.equal(model.run_layer(layer, hidden), whole)  # as it was before
                    assert not torch.allclose(outputs[-1], whole, atol=1e-3)
                else:
                    outputs.append(whole)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the pass


def test_used_layers_beat_the_cut_alone_on_unseen_text(whole: Path, base: Checkpoint, corpus: Corpus) -> None:
    report = load_heal(whole / HEAL_FILE)
    assert [one.layer for one in report.layers] == list(expert_plan(base).layers)
    assert report.used
    for one in report.layers:
        assert one.used is (one.held_out_after < one.held_out_before)
        assert one.tensor.endswith("router.per_expert_scale")
        assert one.kept == KEEP
        assert one.samples + one.held_out_samples == corpus.tokens
        assert one.condition > 1
        if one.used:
            scales = load_file(whole / str(one.file))[one.tensor]
            assert list(scales.shape) == [one.units]
            assert not scales[list(one.dropped)].any()


def test_later_layers_are_fitted_behind_healed_ones(base: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    """The second layer's residual before its heal, from the written checkpoint: dense targets, healed inputs."""
    plan = expert_plan(base)
    settings = dataclasses.replace(SETTINGS, ridges=(1e-2,))
    report = heal(base, plan, corpus, tmp_path / "heal", settings=settings)
    cut(base, plan, tmp_path / "cut", healed=tmp_path / "heal")
    part = split_items(corpus, settings)
    first, second = report.layers[:2]
    rows = []
    for checkpoint in (base, open_checkpoint(tmp_path / "cut")):
        with StreamedModel.open(checkpoint, dtype="float32", experts="recording") as model:
            eps, hidden = float(model.config.rms_norm_eps), []
            for i in (first.layer, second.layer):
                with model.layer(i) as layer:
                    if checkpoint is not base and i == second.layer:
                        stored = torch.from_numpy(base.read(second.tensor).copy()).view(torch.bfloat16)
                        layer.router.per_expert_scale.copy_(stored[list(KEEP)])
                    target, ys = Target(), []
                    hidden = hidden or [model.embed(torch.from_numpy(r.ids.copy())[None]) for r in corpus.items]
                    for k, h in enumerate(hidden):
                        with recorded(layer, target):
                            hidden[k] = model.run_layer(layer, h)
                        ys.append(target.y.double())
            rows.append(torch.cat([y for y, p in zip(ys, part, strict=True) if p == HELD_OUT]))
    dense, small = rows
    root = (dense.square().mean(-1, keepdim=True) + eps).rsqrt()
    dense, small = dense * root, small * root
    cosine = float((dense * small).sum() / (dense.norm() * small.norm()))
    assert second.held_out_before == pytest.approx((1 - cosine**2) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("label", ["layer 1", "layer 4"])
def test_a_stopped_heal_goes_on_with_the_same_bytes(
    base: Checkpoint, corpus: Corpus, whole: Path, tmp_path: Path, label: str
) -> None:
    with pytest.raises(Stop):
        heal(base, expert_plan(base), corpus, tmp_path / "heal", settings=SETTINGS, progress=stop_at(label))
    seen: list[str] = []
    heal(
        base, expert_plan(base), corpus, tmp_path / "heal", settings=SETTINGS,
        progress=lambda done, total, said: seen.append(said),
    )  # fmt: skip
    assert seen[0] == label
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "heal", whole)]
    assert contents[0] == contents[1]


def test_refusals(base: Checkpoint, corpus: Corpus, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drops no expert"):
        heal(base, expert_plan(base, tuple(range(8))), corpus, tmp_path / "no")
    few = dataclasses.replace(corpus, items=corpus.items[:8])
    few = dataclasses.replace(few, items=tuple(dataclasses.replace(row, ids=row.ids[:2]) for row in few.items))
    with pytest.raises(UsageError, match="at least 20 tokens, 4 for each expert"):
        heal(base, expert_plan(base), few, tmp_path / "no", settings=SETTINGS)
    with pytest.raises(CheckpointError, match="another plan"):
        edits_for(expert_plan(base, (1, 2, 3, 5, 6)), base, whole)
    with pytest.raises(CheckpointError, match="another plan"):
        edits_for(head_plan(base, {0: (1,)}), base, whole)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the checkpoint


def test_only_the_scales_differ_and_stock_transformers_loads_it(base: Checkpoint, whole: Path, tmp_path: Path) -> None:
    plan = expert_plan(base)
    edits = edits_for(plan, base, whole)
    plain = edits_for(plan, base)
    used = {one.tensor: one for one in load_heal(whole / HEAL_FILE).layers if one.used}
    assert {name for name in edits if edits[name] != plain[name]} == used.keys()
    assert all(isinstance(edits[name], Replace) and edits[name].then == Take(0, KEEP) for name in used)
    cut(base, plan, tmp_path / "cut", healed=whole)
    out = open_checkpoint(tmp_path / "cut")
    verify_cut(out, base, plan, healed=whole)
    with pytest.raises(CheckpointError, match="not as planned"):
        verify_cut(out, base, plan)
    found = {fact.name: fact.found for fact in load_manifest(tmp_path / "cut" / "manifest.json").tensors}
    assert {name for name, kind in found.items() if kind not in ("same", "take")} == used.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.bfloat16)
    loaded = {name.replace("language_model.", ""): p for name, p in model.named_parameters()}
    for name, one in used.items():
        scales = load_file(whole / str(one.file))[name][list(KEEP)]
        assert torch.equal(loaded[name.replace("language_model.", "")], scales)


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path) -> None:
    """Every second expert goes, in a trained model: a layer is used exactly where it wins on unseen text."""
    base = open_checkpoint(DEMO / "moe")
    corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", base.path, max_tokens=8_000)
    plan = expert_plan(base, tuple(range(0, 32, 2)))
    report = heal(base, plan, corpus, tmp_path / "heal", settings=HealSettings(dtype="float32"))
    assert report.used
    for one in report.layers:
        assert one.used is (one.held_out_after < one.held_out_before)
        assert one.fit_after < one.fit_before
