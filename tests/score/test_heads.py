"""Scores of query heads: on Gram matrices made by hand, and on those of the trained checkpoint that ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.score.synthetic_stats import make_statistics
from tests.tiny import make_tiny

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.families.base import Attention
from gemcut.plan.heads import plan_heads
from gemcut.records import LayerFile, load_gram, load_scores, load_statistics_index, save_scores, save_statistics_index
from gemcut.score import HEAD_CRITERIA, LayerCost, balance_of, rank_correlation, score_heads
from gemcut.score.head_cost import Balance
from gemcut.store import sha256_file
from gemcut.types import F64

DEMO = Path(__file__).parents[2] / "demo"
HEADS, LAYERS = 4, 6


def attention(checkpoint: Checkpoint, layer: int) -> Attention:
    return checkpoint.family.attention(checkpoint.text_config, checkpoint.tensors.keys(), layer)


def tensor(checkpoint: Checkpoint, name: str) -> F64:
    ref = checkpoint.ref(name)
    values = decode(ref.dtype, checkpoint.read(name))
    assert values is not None
    return values.reshape(ref.shape)


def inputs(checkpoint: Checkpoint, layer: int, tokens: int) -> tuple[F64, F64]:
    """Head outputs x [T, d] that overlap between heads, and their weights 1 / mean(y²) [T]."""
    one = attention(checkpoint, layer)
    d = one.heads * one.head_dim
    rng = np.random.default_rng(layer)
    x = rng.normal(size=(tokens, d // 3)) @ rng.normal(size=(d // 3, d)) + rng.normal(size=(tokens, d))
    y = x @ tensor(checkpoint, one.o).T
    return x, 1 / (np.square(y).mean(axis=1) + 1e-6)


def write_grams(checkpoint: Checkpoint, folder: Path, tokens: int = 600, splits: int = 2) -> Path:
    """A statistics folder that holds nothing but Gram matrices, as an observation writes them."""
    folder.mkdir()
    files = []
    for layer in range(LAYERS):
        x, w = inputs(checkpoint, layer, tokens)
        parts = [slice(s, None, splits) for s in range(splits)]
        sums = {
            "g": np.array([(x[p] * w[p, None]).T @ x[p] for p in parts]),
            "x": np.array([w[p] @ x[p] for p in parts]),
            "w": np.array([w[p].sum() for p in parts]),
            "n": np.array([float(len(w[p])) for p in parts]),
        }
        path = folder / f"layer-{layer:03d}.safetensors"
        save_file({f"gram.self_attn.o_proj.{key}": value for key, value in sums.items()}, path)
        files.append(LayerFile(layer=layer, file=path.name, sha256=sha256_file(path)))
    base = make_statistics(np.random.default_rng(0)).meta
    meta = replace(base, model_fingerprint=checkpoint.fingerprint, layers=(), experts=0, top_k=0)
    save_statistics_index(folder, meta, files)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("heads") / "m", "dense"))


@pytest.fixture(scope="module")
def grams(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grams(checkpoint, tmp_path_factory.mktemp("grams") / "s")


def cost_of(checkpoint: Checkpoint, folder: Path, layer: int, gamma: bool = True) -> LayerCost:
    one = attention(checkpoint, layer)
    scale = tensor(checkpoint, one.o.replace("self_attn.o_proj", "post_attention_layernorm")) if gamma else None
    gram = load_gram(folder, load_statistics_index(folder), layer).g
    return LayerCost(gram, tensor(checkpoint, one.o), one.heads, one.head_dim, gamma=scale)


# ---------------------------------------------------------------- what the numbers are


def test_norm_is_the_sum_over_tokens(checkpoint: Checkpoint, grams: Path) -> None:
    scores = score_heads(checkpoint, grams, "norm", drop=1)
    assert (scores.kind, scores.layers, scores.values.shape) == ("heads", tuple(range(LAYERS)), (LAYERS, HEADS))
    for layer in (0, 5):
        one = attention(checkpoint, layer)
        x, w = inputs(checkpoint, layer, 600)
        weight = tensor(checkpoint, one.o)
        for h in range(HEADS):
            at = slice(h * one.head_dim, (h + 1) * one.head_dim)
            added = x[:, at] @ weight[:, at].T
            assert scores.values[layer, h] == pytest.approx(float((w[:, None] * added**2).sum()), rel=1e-9)


@pytest.mark.parametrize(("drop", "mode"), [(1, "mask"), (2, "mask"), (3, "mask"), (2, "structural")])
def test_obs_puts_the_best_set_lowest(checkpoint: Checkpoint, grams: Path, drop: int, mode: str) -> None:
    scores = score_heads(checkpoint, grams, "obs", drop=drop, mode=mode)  # type: ignore[arg-type]
    shapes = {layer: attention(checkpoint, layer) for layer in range(LAYERS)}
    plan = plan_heads(scores, shapes, drop=drop, mode=mode).plan  # type: ignore[arg-type]
    for layer, one in shapes.items():
        cost = cost_of(checkpoint, grams, layer)
        best = cost.best(drop, balance_of(one, drop, mode))  # type: ignore[arg-type]
        assert tuple(np.argsort(scores.values[layer])[:drop]) == best
        assert sorted(plan.layers[layer].drop) == sorted(best)  # a plan under the same rule finds the same set
        kept = [h for h in range(HEADS) if h not in best]
        wanted = [drop + cost.cost([h]) / cost.total for h in kept]
        np.testing.assert_allclose(scores.values[layer, kept], wanted, rtol=1e-9)
    assert scores.params == {"ridge_rel": 0.01, "gamma": "scaled", "drop": drop, "mode": mode}


def test_nothing_to_drop_ranks_single_costs(checkpoint: Checkpoint, grams: Path) -> None:
    scores = score_heads(checkpoint, grams, drop=0)
    cost = cost_of(checkpoint, grams, 2)
    np.testing.assert_allclose(scores.values[2], cost.singles() / cost.total)


def test_gamma_can_be_left_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = open_checkpoint(make_tiny(tmp_path / "m", "dense", seed=1, dtype="float32"))
    name = attention(other, 0).o.replace("self_attn.o_proj", "post_attention_layernorm")
    shard = other.path / other.ref(name).shard
    tensors = load_file(shard)
    tensors[name] = np.linspace(0.1, 3, len(tensors[name])).astype(np.float32)
    save_file(tensors, shard, metadata={"format": "pt"})
    other = open_checkpoint(other.path)
    folder = write_grams(other, tmp_path / "s")
    for name, mine in (("obs", True), ("obs", False)):
        gamma = "scaled" if mine else "plain"
        values = score_heads(other, folder, name, drop=0, params={"gamma": gamma}).values
        cost = cost_of(other, folder, 0, gamma=mine)
        np.testing.assert_allclose(values[0], cost.singles() / cost.total)
    plain, scaled = (
        score_heads(other, folder, "norm", drop=0, params={"gamma": g}).values for g in ("plain", "scaled")
    )
    assert np.abs(scaled[0] / plain[0] - 1).max() > 0.01
    unhealed = [cost_of(other, folder, 0).unhealed([h]) for h in range(HEADS)]
    np.testing.assert_allclose(scaled[0], unhealed, rtol=0.02)  # the ridge is in one and not in the other


def test_measured_importance_is_taken_as_it_is(checkpoint: Checkpoint, grams: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(LAYERS, HEADS))
    for name in ("loo", "taylor", "random"):
        scores = score_heads(checkpoint, grams, name, drop=1, importance=numbers)
        np.testing.assert_array_equal(scores.values, numbers)
        assert scores.criterion == name
    part = score_heads(checkpoint, grams, "loo", drop=1, importance=numbers[:2], layers=[4, 1])
    assert part.layers == (1, 4)
    np.testing.assert_array_equal(part.values, numbers[:2])


def test_random_is_by_seed_and_layer(checkpoint: Checkpoint, grams: Path) -> None:
    one, again = (score_heads(checkpoint, grams, "random", drop=1).values for _ in range(2))
    np.testing.assert_array_equal(one, again)
    other = score_heads(checkpoint, grams, "random", drop=1, params={"seed": 1}).values
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(score_heads(checkpoint, grams, "random", drop=1, layers=[3]).values[0], one[3])


def test_scores_survive_the_disk(checkpoint: Checkpoint, grams: Path, tmp_path: Path) -> None:
    scores = score_heads(checkpoint, grams, drop=2)
    save_scores(scores, tmp_path / "o")
    read = load_scores(tmp_path / "o")
    np.testing.assert_array_equal(read.values, scores.values)
    assert (read.kind, read.params, read.layers) == ("heads", scores.params, scores.layers)


def test_progress_names_every_layer(checkpoint: Checkpoint, grams: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    score_heads(checkpoint, grams, "norm", drop=1, layers=[0, 3], progress=lambda *step: seen.append(step))
    assert seen == [(1, 2, "layer 0"), (2, 2, "layer 3")]


def test_every_criterion_says_what_it_is() -> None:
    for name, one in HEAD_CRITERIA.items():
        assert one.name == name
        assert one.about
        assert one.source
        assert one.rank.__doc__, name


# ---------------------------------------------------------------- parts of the corpus


def test_parts_of_a_gram_add_up(checkpoint: Checkpoint, grams: Path) -> None:
    index = load_statistics_index(grams)
    whole, one, two = (load_gram(grams, index, 5, split=s, check_hash=True) for s in (None, 0, 1))
    np.testing.assert_array_equal(whole.g, one.g + two.g)
    np.testing.assert_array_equal(whole.x, one.x + two.x)
    assert (whole.n, one.n, two.n, whole.splits) == (600, 300, 300, 2)
    assert whole.w == pytest.approx(one.w + two.w)
    with pytest.raises(UsageError, match="no such part"):
        load_gram(grams, index, 5, split=2)
    with pytest.raises(UsageError, match="no such layer"):
        load_gram(grams, index, 6)


# ---------------------------------------------------------------- refusals


def rewrite(folder: Path, layer: int, change: Callable[[dict[str, F64]], None]) -> Path:
    path = folder / f"layer-{layer:03d}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return folder


G = "gram.self_attn.o_proj.g"


def test_statistics_of_another_model(checkpoint: Checkpoint, grams: Path, tmp_path: Path) -> None:
    other = open_checkpoint(make_tiny(tmp_path / "m", "dense", seed=5))
    with pytest.raises(CheckpointError, match="another checkpoint"):
        score_heads(other, grams, drop=1)


def test_too_few_tokens_name_what_is_needed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = write_grams(checkpoint, tmp_path / "s", tokens=100)
    with pytest.raises(UsageError, match="fewer tokens than it has columns") as error:
        score_heads(checkpoint, folder, drop=1)
    assert error.value.where == "layer 5"  # the full layer has 128 columns, the others 64
    assert error.value.wanted == "at least 128 tokens, better 512"
    assert score_heads(checkpoint, folder, drop=1, layers=range(5)).values.shape == (5, HEADS)


def test_no_gram(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = write_grams(checkpoint, tmp_path / "s")
    rewrite(folder, 2, lambda t: [t.pop(k) for k in list(t)] and t.update(other=np.zeros(1)))  # type: ignore[func-returns-value]
    with pytest.raises(UsageError, match="hold no Gram matrix"):
        score_heads(checkpoint, folder, drop=1)
    assert score_heads(checkpoint, folder, "random", drop=1).values.shape == (LAYERS, HEADS)  # needs none


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({G: t[G][:, :32, :32]}), "another form"),
        (lambda t: t.update({G: t[G].astype(np.float32)}), "another form"),
        (lambda t: t.pop("gram.self_attn.o_proj.n"), "is missing"),
        (lambda t: t[G].__setitem__((0, 3, 4), np.nan), "impossible values"),
        (lambda t: t[G].__setitem__((0, 3, 3), -1e9), "impossible values"),
        (lambda t: t.update({k: v[..., :32] if v.ndim > 1 else v for k, v in t.items()} | {G: t[G][:, :32, :32]}),
         "another width"),
    ],
)  # fmt: skip
def test_damaged_grams(
    checkpoint: Checkpoint, tmp_path: Path, change: Callable[[dict[str, F64]], None], match: str
) -> None:
    folder = rewrite(write_grams(checkpoint, tmp_path / "s"), 1, change)
    with pytest.raises(CheckpointError, match=match):
        score_heads(checkpoint, folder, drop=1)


def test_truncated_and_changed_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = write_grams(checkpoint, tmp_path / "s")
    path = folder / "layer-001.safetensors"
    rewrite(folder, 1, lambda t: t[G].__setitem__((0, 3, 3), 7.0))
    with pytest.raises(CheckpointError, match="not what was recorded"):
        load_gram(folder, load_statistics_index(folder), 1, check_hash=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read"):
        score_heads(checkpoint, folder, drop=1)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        score_heads(checkpoint, folder, drop=1)


def test_bad_requests(checkpoint: Checkpoint, grams: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(LAYERS, HEADS))
    with pytest.raises(UsageError, match="no criterion of heads 'reap'"):
        score_heads(checkpoint, grams, "reap", drop=1)
    with pytest.raises(UsageError, match="has no parameter 'ridge'"):
        score_heads(checkpoint, grams, drop=1, params={"ridge": 1})
    with pytest.raises(UsageError, match="out of bounds"):
        score_heads(checkpoint, grams, drop=1, params={"ridge_rel": 0})
    with pytest.raises(UsageError, match="pass its numbers as importance"):
        score_heads(checkpoint, grams, "loo", drop=1)
    with pytest.raises(UsageError, match="takes no importance"):
        score_heads(checkpoint, grams, "obs", drop=1, importance=numbers)
    with pytest.raises(UsageError, match="other layers or heads"):
        score_heads(checkpoint, grams, "loo", drop=1, importance=numbers[:, :3])
    with pytest.raises(UsageError, match="so many heads cannot be removed"):
        score_heads(checkpoint, grams, drop=4)
    with pytest.raises(UsageError, match="no such layer"):
        score_heads(checkpoint, grams, drop=1, layers=[6])
    with pytest.raises(QualityError, match="nothing to rank"):
        score_heads(checkpoint, grams, "loo", drop=1, importance=np.ones((LAYERS, HEADS)))
    numbers[3, 2] = np.nan
    with pytest.raises(QualityError, match="not finite"):
        score_heads(checkpoint, grams, "loo", drop=1, importance=numbers)


def test_balance_of_the_large_model() -> None:
    """32 query heads on 16 KV heads lose whole groups where 32 on 4 lose the same of each."""
    sliding, full = (Attention(32, kv, dim, dim == 512, "q", "k", "v", "o") for kv, dim in ((16, 256), (4, 512)))
    assert balance_of(sliding, 8, "structural") == Balance(16, 2, "groups")
    assert balance_of(full, 8, "structural") == Balance(4, 8, "equal")
    assert balance_of(sliding, 4) == Balance(16, 2, "spread")
    with pytest.raises(UsageError, match="another KV head") as error:
        balance_of(full, 6, "structural", "layer 5")
    assert error.value.wanted == "0 or 4 or 8 or 12"


# ---------------------------------------------------------------- agreement of rankings


def test_rank_correlation_of_known_orders() -> None:
    a = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    assert rank_correlation(a, np.exp(a)).value == pytest.approx(1.0)
    assert rank_correlation(a, -a).value == pytest.approx(-1.0)
    both = rank_correlation(a, np.array([[1.0, 2, 3, 4], [4, 3, 2, 1]]))
    assert (both.value, both.low, both.high, both.n) == (pytest.approx(0.0), pytest.approx(-1), pytest.approx(1), 2)
    # 1 − 6·Σd²/(n³ − n) = 1 − 6·2/60
    assert rank_correlation(a[:1], np.array([[2.0, 1, 3, 4]])).value == pytest.approx(0.8)


@given(st.integers(0, 10**6))
def test_rank_correlation_ignores_scale_and_shares_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, (6, 8)).astype(float), rng.normal(size=(6, 8))
    a[:, 0] = 9  # no constant row
    first = rank_correlation(a, b)
    assert first == rank_correlation(3 * a + 1, np.exp(b))
    shuffle = rng.permutation(8)
    assert rank_correlation(a[:, shuffle], b[:, shuffle]).value == pytest.approx(first.value)
    assert -1 <= first.low <= first.value <= first.high <= 1


def test_rank_correlation_refuses_what_has_no_order() -> None:
    a = np.random.default_rng(0).normal(size=(3, 4))
    with pytest.raises(UsageError, match="two rankings"):
        rank_correlation(a, a[:, :3])
    with pytest.raises(QualityError, match="same value"):
        rank_correlation(a, np.ones((3, 4)))
    with pytest.raises(QualityError, match="not finite"):
        rank_correlation(a, np.where(a == a.max(), np.nan, a))


# ---------------------------------------------------------------- the real thing


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """The trained dense checkpoint, observed on a few texts of every class."""
    from gemcut.observe.run import observe
    from gemcut.stream.corpus import load_corpus

    checkpoint = open_checkpoint(DEMO / "dense")
    corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", DEMO / "dense")
    kept = tuple(row for cls in corpus.classes for row in [r for r in corpus.items if r.cls == cls][:4])
    out = observe(checkpoint, replace(corpus, items=kept), tmp_path_factory.mktemp("demo") / "s")
    return checkpoint, out


@pytest.mark.skipif(not (DEMO / "dense" / "config.json").exists(), reason="the demo checkpoint is not here")
@pytest.mark.parametrize("drop", [1, 2])
def test_obs_never_costs_more_than_norm_on_real_heads(demo: tuple[Checkpoint, Path], drop: int) -> None:
    checkpoint, folder = demo
    assert json.loads((folder / "statistics.json").read_text())["meta"]["layers"] == []
    obs = score_heads(checkpoint, folder, "obs", drop=drop)
    norm = score_heads(checkpoint, folder, "norm", drop=drop)
    shapes = {layer: attention(checkpoint, layer) for layer in obs.layers}
    ours, theirs = (plan_heads(scores, shapes, drop=drop).plan for scores in (obs, norm))
    better = 0
    for layer in obs.layers:
        cost = cost_of(checkpoint, folder, layer)
        mine, other = (cost.cost(plan.layers[layer].drop) for plan in (ours, theirs))
        assert mine <= other * (1 + 1e-12), layer
        better += mine < 0.99 * other
        assert cost.cost(ours.layers[layer].drop) < 0.9 * cost.unhealed(ours.layers[layer].drop)
    assert better >= 1
    agreement = rank_correlation(obs.values, norm.values)
    assert 0 < agreement.value < 1
    assert agreement.n == 12
