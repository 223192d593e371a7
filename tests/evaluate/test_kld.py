"""Streamed KLD equals both models in memory, equal models give exactly zero, and nothing of vocabulary size is kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.tiny import make_tiny
from transformers import AutoModelForCausalLM

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.evaluate.kld import KldSettings, kld, kld_chunks
from gemcut.records.results import kld_from_json, kld_to_json
from gemcut.stream.corpus import Corpus, load_corpus
from gemcut.types import Estimate, KldResult, KldRow

FLOAT32 = KldSettings(dtype="float32")
SIZES = {"code": (40, 9, 130, 40, 130, 40), "math": (9, 40, 9), "prose": (55,)}
SHAPE = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kld")
    make_tiny(path / "base", "moe", initializer_range=0.3, **SHAPE)
    make_tiny(path / "dense", "dense", initializer_range=0.3, **SHAPE)
    changed(path / "base", path / "noisy", noise)
    changed(path / "base", path / "cut", drop_experts, num_experts=6)
    return path


@pytest.fixture(scope="module")
def corpus(root: Path) -> Corpus:
    """Ten items of three classes; "prose" has a single one."""
    rng = np.random.default_rng(0)
    lines = []
    for cls, sizes in SIZES.items():
        for i, size in enumerate(sizes):
            text = "".join(chr(c) for c in rng.integers(97, 123, size))
            lines.append(json.dumps({"id": f"{cls}{i}", "class": cls, "text": text}))
    (root / "c.jsonl").write_text("\n".join(lines))
    return load_corpus(root / "c.jsonl", root / "base")


@pytest.fixture(scope="module")
def checkpoints(root: Path) -> dict[str, Checkpoint]:
    return {name: open_checkpoint(root / name) for name in ("base", "noisy", "cut", "dense")}


@pytest.fixture(scope="module")
def progress() -> dict[str, tuple[int, int]]:
    """What the run of `plain` said last under each label."""
    return {}


@pytest.fixture(scope="module")
def plain(corpus: Corpus, checkpoints: dict[str, Checkpoint], progress: dict[str, tuple[int, int]]) -> KldResult:
    """base against cut with no options but float32."""

    def note(done: int, total: int, label: str) -> None:
        progress[label] = (done, total)

    return kld(checkpoints["base"], [checkpoints["cut"]], corpus, FLOAT32, progress=note)[0]


def changed(base: Path, out: Path, edit, **config: int) -> Path:
    """A candidate: every tensor through `edit`, config keys replaced."""
    shutil.copytree(base, out)
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            tensors = {name: edit(name, f.get_tensor(name)).contiguous() for name in f.keys()}  # noqa: SIM118
        save_file(tensors, shard, metadata={"format": "pt"})
    value = json.loads((out / "config.json").read_text())
    value.get("text_config", value).update(config)
    (out / "config.json").write_text(json.dumps(value))
    return out


def noise(name: str, value: torch.Tensor) -> torch.Tensor:
    seed = sum(name.encode())
    rough = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return (value.float() * (1 + 0.05 * rough)).to(value.dtype)


def drop_experts(name: str, value: torch.Tensor) -> torch.Tensor:
    """Keep experts 0, 1, 3, 4, 6, 7 of 8: fused weights, router rows and scales."""
    if name.endswith(("experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.per_expert_scale")):
        return value[[0, 1, 3, 4, 6, 7]]
    return value


def direct(root: Path, base: str, candidate: str, corpus: Corpus) -> dict[str, dict[str, np.ndarray]]:
    """Both stock models whole in memory, one item at a time, plain float64 softmax."""
    models = [AutoModelForCausalLM.from_pretrained(root / n, dtype=torch.float32).eval() for n in (base, candidate)]
    out: dict[str, dict[str, list[np.ndarray]]] = {}
    for row in corpus.items:
        ids = torch.from_numpy(row.ids.copy())
        with torch.no_grad():
            a, b = (torch.log_softmax(m(input_ids=ids[None]).logits[0, :-1].double(), -1) for m in models)
        pick = torch.arange(len(ids) - 1)
        values = {
            "kl": (a.exp() * (a - b)).sum(-1),
            "same": (a.argmax(-1) == b.argmax(-1)).double(),
            "base": -a[pick, ids[1:]],
            "candidate": -b[pick, ids[1:]],
        }
        for cls in (row.cls, "all"):
            for key, value in values.items():
                out.setdefault(cls, {}).setdefault(key, []).append(value.numpy())
    return {cls: {key: np.concatenate(v) for key, v in part.items()} for cls, part in out.items()}


def by_class(result: KldResult) -> dict[str, KldRow]:
    return {row.cls: row for row in result.rows}


@pytest.mark.parametrize("candidate", ["noisy", "cut"])
def test_streamed_is_the_full_model(
    root: Path, corpus: Corpus, checkpoints: dict[str, Checkpoint], candidate: str
) -> None:
    result = kld(checkpoints["base"], [checkpoints[candidate]], corpus, FLOAT32)[0]
    wanted = direct(root, "base", candidate, corpus)
    assert [row.cls for row in result.rows] == ["code", "math", "prose", "all"]
    assert wanted["all"]["kl"].mean() > 0.01  # the comparison is about something
    for row in result.rows:
        w = wanted[row.cls]
        assert row.tokens == len(w["kl"])
        assert row.mean.value == pytest.approx(w["kl"].mean(), abs=1e-6)
        assert row.median.value == pytest.approx(np.quantile(w["kl"], 0.5, method="inverted_cdf"), abs=1e-6)
        assert row.p99.value == pytest.approx(np.quantile(w["kl"], 0.99, method="inverted_cdf"), abs=1e-6)
        assert row.same_top.value == pytest.approx(w["same"].mean(), abs=1e-12)
        assert row.ln_ppl_ratio.value == pytest.approx((w["candidate"] - w["base"]).mean(), abs=1e-6)
        assert math.log(row.ppl_base) == pytest.approx(w["base"].mean(), abs=1e-6)
        assert math.log(row.ppl_candidate) == pytest.approx(w["candidate"].mean(), abs=1e-6)
        assert row.mean.n == len(SIZES.get(row.cls, sum(SIZES.values(), ())))
        for estimate in (row.mean, row.median, row.p99, row.same_top, row.ln_ppl_ratio):
            assert estimate.low <= estimate.value <= estimate.high
    assert by_class(result)["prose"].mean.n == 1
    assert by_class(result)["code"].mean.low < by_class(result)["code"].mean.high


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_equal_models_give_exactly_zero(
    root: Path, corpus: Corpus, checkpoints: dict[str, Checkpoint], tmp_path: Path, dtype: str | None
) -> None:
    shutil.copytree(root / "base", tmp_path / "twin")
    base = checkpoints["base"]
    for result in kld(base, [base, open_checkpoint(tmp_path / "twin")], corpus, KldSettings(dtype=dtype)):
        assert result.dtype == (dtype or "bfloat16")
        for row in result.rows:
            for estimate in (row.mean, row.median, row.p99, row.ln_ppl_ratio):
                assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
            assert (row.same_top.value, row.same_top.low, row.same_top.high) == (1.0, 1.0, 1.0)
            assert row.ppl_base == row.ppl_candidate


def test_candidates_share_the_base_and_do_not_touch_each_other(
    corpus: Corpus, checkpoints: dict[str, Checkpoint], plain: KldResult
) -> None:
    base, noisy, cut = (checkpoints[name] for name in ("base", "noisy", "cut"))
    together = kld(base, [noisy, cut], corpus, FLOAT32)
    assert together == [kld(base, [noisy], corpus, FLOAT32)[0], plain]
    assert [r.candidate for r in together] == ["noisy", "cut"]
    assert {r.base_fingerprint for r in together} == {base.fingerprint}
    assert together[1].candidate_fingerprint == cut.fingerprint


def test_another_architecture_of_the_same_vocabulary(
    root: Path, corpus: Corpus, checkpoints: dict[str, Checkpoint]
) -> None:
    result = kld(checkpoints["base"], [checkpoints["dense"]], corpus, FLOAT32)[0]
    wanted = direct(root, "base", "dense", corpus)["all"]["kl"].mean()
    assert by_class(result)["all"].mean.value == pytest.approx(wanted, abs=1e-6)


def test_batches_and_memory_do_not_change_the_figures(
    corpus: Corpus, checkpoints: dict[str, Checkpoint], plain: KldResult, tmp_path: Path
) -> None:
    base, cut = checkpoints["base"], checkpoints["cut"]
    for options in ({"batch_tokens": 1}, {"batch_tokens": 100_000, "memory_bytes": 0}, {"memory_bytes": 300_000}):
        other = kld(base, [cut], corpus, KldSettings(dtype="float32", scratch=tmp_path, **options))[0]
        for a, b in zip(plain.rows, other.rows, strict=True):
            assert b.mean.value == pytest.approx(a.mean.value, abs=1e-7)
            assert b.p99.high == pytest.approx(a.p99.high, abs=1e-6)
            assert b.same_top.value == a.same_top.value
    assert list(tmp_path.iterdir()) == []  # nameless files: nothing is left, not even after a kill


def test_chunks_give_the_same_means_and_pair_the_candidates(
    corpus: Corpus, checkpoints: dict[str, Checkpoint], plain: KldResult
) -> None:
    candidates = [checkpoints["cut"], checkpoints["noisy"], checkpoints["cut"]]
    found = kld_chunks(checkpoints["base"], candidates, corpus, FLOAT32)
    assert found.mean(0) == plain.rows[-1].mean
    assert int(found.tokens.sum()) == corpus.scored_tokens
    assert found.kl.shape == (3, len(corpus.items))
    difference = found.difference(0, 1)
    assert difference.value == pytest.approx(found.mean(0).value - found.mean(1).value)
    assert difference.value != 0
    # the same model twice: unpaired intervals would be as wide as those of the means
    assert found.difference(0, 2) == Estimate(0.0, 0.0, 0.0, len(corpus.items))
    assert found.ratio(0, 2) == Estimate(1.0, 1.0, 1.0, len(corpus.items))
    with pytest.raises(UsageError, match="no candidate"):
        kld_chunks(checkpoints["base"], [], corpus)


def test_chunks_are_items_or_runs_of_their_tokens(
    corpus: Corpus, checkpoints: dict[str, Checkpoint], plain: KldResult
) -> None:
    base, cut = checkpoints["base"], checkpoints["cut"]
    runs = kld(base, [cut], corpus, KldSettings(dtype="float32", chunk_tokens=20))[0]
    assert plain.chunks == len(corpus.items) == 10
    wanted = {cls: sum(-(-size // 20) for size in sizes) for cls, sizes in SIZES.items()}
    wanted["all"] = sum(wanted.values())
    assert {row.cls: row.mean.n for row in runs.rows} == wanted
    assert runs.chunks == wanted["all"]
    for a, b in zip(plain.rows, runs.rows, strict=True):
        assert a.mean.value == pytest.approx(b.mean.value, rel=1e-12)
        assert a.tokens == b.tokens
    with pytest.raises(UsageError, match="chunk_tokens"):
        kld(base, [cut], corpus, KldSettings(chunk_tokens=0))


def test_the_seed_moves_only_the_intervals(
    corpus: Corpus, checkpoints: dict[str, Checkpoint], plain: KldResult
) -> None:
    other = kld(checkpoints["base"], [checkpoints["cut"]], corpus, KldSettings(dtype="float32", seed=1))[0]
    first, second = by_class(plain)["all"], by_class(other)["all"]
    assert first.mean.value == second.mean.value
    assert (first.mean.low, first.mean.high) != (second.mean.low, second.mean.high)
    assert (plain.seed, other.seed) == (0, 1)


def test_the_record_survives_the_disk_and_holds_no_path(root: Path, corpus: Corpus, plain: KldResult) -> None:
    value = kld_to_json(plain)
    assert kld_from_json(json.loads(json.dumps(value)), root / "kld.json") == plain
    assert str(root) not in json.dumps(value)
    assert (plain.corpus_hash, plain.template_hash) == (corpus.hash, corpus.template_hash)


def test_progress_reaches_its_end_for_every_label(
    corpus: Corpus, plain: KldResult, progress: dict[str, tuple[int, int]]
) -> None:
    assert plain.chunks == 10
    assert progress == {
        "base: base": (3, 3),
        "candidate 1/1: cut": (3, 3),
        "head, tokens": (corpus.scored_tokens, corpus.scored_tokens),
    }


# ---------------------------------------------------------------- what is refused


def test_another_tokenizer_or_vocabulary(
    root: Path, corpus: Corpus, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    shutil.copytree(root / "base", tmp_path / "other")
    value = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = value["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"another tokenizer(?s:.*)other"):
        kld(checkpoints["base"], [open_checkpoint(tmp_path / "other")], corpus)
    make_tiny(tmp_path / "larger", "moe", vocab_size=352, **SHAPE)
    shutil.copy(root / "base" / "tokenizer.json", tmp_path / "larger")
    with pytest.raises(CheckpointError, match=r"different vocabularies(?s:.*)larger(?s:.*)352(?s:.*)320"):
        kld(checkpoints["base"], [open_checkpoint(tmp_path / "larger")], corpus)


def test_a_broken_layer_is_named(
    root: Path, corpus: Corpus, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        return value * float("nan") if name.endswith("layers.2.mlp.down_proj.weight") else value

    changed(root / "base", tmp_path / "broken", spoil)
    with pytest.raises(QualityError, match=r"not finite(?s:.*)broken, layer 2, item 'code\d', token \d"):
        kld(checkpoints["base"], [open_checkpoint(tmp_path / "broken")], corpus)


def test_a_broken_head_is_named(root: Path, corpus: Corpus, checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        return value * float("inf") if name.endswith("language_model.norm.weight") else value

    changed(root / "base", tmp_path / "broken", spoil)
    with pytest.raises(QualityError, match=r"logit is not finite(?s:.*)broken, item 'code0', token 0"):
        kld(checkpoints["base"], [open_checkpoint(tmp_path / "broken")], corpus)


def test_no_candidate_and_a_class_named_all(root: Path, checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "a", "class": "all", "text": "abc"}))
    pooled = load_corpus(tmp_path / "c.jsonl", root / "base")
    with pytest.raises(UsageError, match="no candidate"):
        kld(checkpoints["base"], [], pooled)
    with pytest.raises(UsageError, match="may not be named 'all'"):
        kld(checkpoints["base"], [checkpoints["cut"]], pooled)
