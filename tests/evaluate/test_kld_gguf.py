"""KL divergence with GGUF files on either side: the sums of logits that llama.cpp gave, and the same ids everywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import make_tiny

from gemcut import exporting
from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.evaluate import kld as module
from gemcut.evaluate.kld import KldSettings, kld
from gemcut.ggml.model import Model
from gemcut.gguf_file.header import GgufFile, open_gguf
from gemcut.stream.corpus import Corpus, load_corpus

ONE = KldSettings(threads=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf-kld")
    make_tiny(path / "base", "dense", initializer_range=0.1)
    words = exporting.GgufWords(("BF16", "Q8_0", "Q4_0"))
    exporting.write_export(exporting.plan_export(open_checkpoint(path / "base"), words), path, threads=1)
    return path


@pytest.fixture(scope="module")
def base(root: Path) -> Checkpoint:
    return open_checkpoint(root / "base")


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, GgufFile]:
    return {kind: open_gguf(root / f"base-{kind}.gguf") for kind in ("BF16", "Q8_0", "Q4_0")}


@pytest.fixture(scope="module")
def corpus(root: Path) -> Corpus:
    rng = np.random.default_rng(0)
    lines = []
    for cls, sizes in {"code": (40, 9, 130, 300), "prose": (55, 80)}.items():
        for i, size in enumerate(sizes):
            text = "".join(chr(c) for c in rng.integers(97, 123, size))
            lines.append(json.dumps({"id": f"{cls}{i}", "class": cls, "text": text}))
    (root / "c.jsonl").write_text("\n".join(lines))
    return load_corpus(root / "c.jsonl", root / "base")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def direct(first: Path, second: Path, corpus: Corpus, skip: int = 0) -> dict[str, np.ndarray]:
    """Both files by themselves, item by item, all logits in memory."""
    found: dict[str, list[np.ndarray]] = {"kl": [], "same": [], "ln": []}
    with Model(first, threads=1, context=512) as a, Model(second, threads=1, context=512) as b:
        for row in corpus.items:
            p, q = (log_softmax(m.logits(row.ids[:-1].tolist()))[skip:] for m in (a, b))
            pick, ids = np.arange(len(p)), row.ids[1 + skip :]
            found["kl"].append((np.exp(p) * (p - q)).sum(-1))
            found["same"].append((p.argmax(-1) == q.argmax(-1)).astype(float))
            found["ln"].append(p[pick, ids] - q[pick, ids])
    return {key: np.concatenate(value) for key, value in found.items()}


def test_two_files_are_compared_by_the_logits_that_llama_cpp_gives(
    root: Path, files: dict[str, GgufFile], corpus: Corpus
) -> None:
    settings = replace(ONE, tokenizer=root / "base")
    result = kld(files["BF16"], [files["Q4_0"]], corpus, settings)[0]
    wanted = direct(files["BF16"].path, files["Q4_0"].path, corpus)
    row = result.rows[-1]
    assert row.tokens == corpus.scored_tokens == len(wanted["kl"])
    assert wanted["kl"].mean() > 0.001
    assert row.mean.value == pytest.approx(wanted["kl"].mean(), rel=1e-9)
    assert row.median.value == pytest.approx(np.quantile(wanted["kl"], 0.5, method="inverted_cdf"), rel=1e-9)
    assert row.same_top.value == pytest.approx(wanted["same"].mean())
    assert row.ln_ppl_ratio.value == pytest.approx(wanted["ln"].mean(), abs=1e-9)
    assert row.mean.n == result.chunks == len(corpus.items)
    assert (result.candidate, result.dtype) == ("base-Q4_0.gguf", "gguf")
    assert result.base_fingerprint != result.candidate_fingerprint
    assert str(root) not in repr(result)


def test_a_file_against_itself_is_exactly_zero(root: Path, files: dict[str, GgufFile], corpus: Corpus) -> None:
    result = kld(files["Q8_0"], [files["Q8_0"]], corpus, replace(ONE, tokenizer=root / "base"))[0]
    assert result.base_fingerprint == result.candidate_fingerprint
    for row in result.rows:
        assert (row.mean.value, row.p99.value, row.ln_ppl_ratio.value, row.same_top.value) == (0.0, 0.0, 0.0, 1.0)


def test_a_folder_against_its_own_weights_shows_only_arithmetic(
    base: Checkpoint, files: dict[str, GgufFile], corpus: Corpus
) -> None:
    floor, eight, four = kld(base, [files["BF16"], files["Q8_0"], files["Q4_0"]], corpus, ONE)
    means = [one.rows[-1].mean.value for one in (floor, eight, four)]
    assert means[0] < 0.1 * means[1] < 0.1 * means[2]
    assert floor.dtype == "float32"  # nearer to llama.cpp's arithmetic than the stored bfloat16
    assert kld(base, [files["BF16"]], corpus, replace(ONE, dtype="bfloat16"))[0].rows[-1].mean.value > means[0]


def test_files_and_folders_mix_and_groups_change_nothing(
    root: Path, base: Checkpoint, files: dict[str, GgufFile], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [files["Q8_0"], base, files["Q4_0"]]
    together = kld(base, candidates, corpus, ONE)
    assert together[1].rows[-1].mean.value == 0.0
    settings = replace(ONE, tokenizer=root / "base")
    on_file = kld(files["BF16"], candidates, corpus, settings)
    monkeypatch.setattr(module, "_MAPPED_SHARE", 0.0)  # no two files at once
    assert module._groups([files["BF16"], *candidates]) == [[1, 2], [3]]
    assert kld(base, candidates, corpus, ONE) == together
    assert kld(files["BF16"], candidates, corpus, settings) == on_file


def test_the_first_tokens_of_an_item_can_be_context_only(
    root: Path, files: dict[str, GgufFile], corpus: Corpus
) -> None:
    settings = replace(ONE, tokenizer=root / "base", context_tokens=30)
    result = kld(files["BF16"], [files["Q4_0"]], corpus, settings)[0]
    wanted = direct(files["BF16"].path, files["Q4_0"].path, corpus, skip=30)
    assert result.rows[-1].tokens == len(wanted["kl"])
    assert result.rows[-1].mean.value == pytest.approx(wanted["kl"].mean(), rel=1e-9)
    assert result.chunks == sum(len(row.ids) - 1 > 30 for row in corpus.items)
    for wrong in (-1, max(len(row.ids) for row in corpus.items) - 1):
        with pytest.raises(UsageError, match="context_tokens"):
            kld(files["BF16"], [files["Q4_0"]], corpus, replace(settings, context_tokens=wrong))


# ---------------------------------------------------------------- what is refused


def test_other_tokens_than_the_corpus(root: Path, files: dict[str, GgufFile], corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "other")
    value = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"other tokens than the corpus(?s:.*)base-BF16\.gguf, token \d+"):
        kld(files["BF16"], [files["Q8_0"]], corpus, replace(ONE, tokenizer=tmp_path / "other"))


def test_another_vocabulary(root: Path, base: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    make_tiny(tmp_path / "larger", "dense", vocab_size=352)
    exports = exporting.plan_export(open_checkpoint(tmp_path / "larger"), exporting.GgufWords(("Q8_0",)))
    exporting.write_export(exports, tmp_path, threads=1)
    with pytest.raises(CheckpointError, match=r"different vocabularies(?s:.*)352"):
        kld(base, [open_gguf(tmp_path / "larger-Q8_0.gguf")], corpus, ONE)


@pytest.mark.parametrize("change", [lambda ids: ids[1:], lambda ids: np.insert(ids, 0, 2)], ids=["none", "two"])
def test_exactly_one_bos(base: Checkpoint, files: dict[str, GgufFile], corpus: Corpus, change) -> None:
    row = corpus.items[2]
    spoiled = replace(corpus, items=(*corpus.items[:2], replace(row, ids=change(row.ids)), *corpus.items[3:]))
    with pytest.raises(CheckpointError, match=r"exactly one BOS(?s:.*)code2"):
        kld(base, [files["Q8_0"]], spoiled, ONE)


def test_logits_that_are_not_finite_are_named(
    base: Checkpoint, files: dict[str, GgufFile], corpus: Corpus, tmp_path: Path
) -> None:
    """A norm of 1e38 is finite, and loads; what comes out of it is not."""
    raw = bytearray(files["Q8_0"].path.read_bytes())
    ref = files["Q8_0"].ref("output_norm.weight")
    raw[ref.start : ref.start + ref.size_bytes] = np.full(ref.size_bytes // 4, 3e38, "<f4").tobytes()
    (tmp_path / "broken.gguf").write_bytes(raw)
    with pytest.raises(QualityError, match=r"logit is not finite(?s:.*)broken\.gguf, item 'code0', token 0"):
        kld(base, [open_gguf(tmp_path / "broken.gguf")], corpus, ONE)
