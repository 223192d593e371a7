"""KLD of NVFP4 folders, streamed, against the models whole in memory; what is broken is refused before the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError
from gemcut.evaluate.kld import KldSettings, kld
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.stream.corpus import Corpus, load_corpus
from gemcut.stream.whole import load_whole
from observed import EVEN, statistics
from tiny import make_tiny

FLOAT32 = KldSettings(dtype="float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    place = tmp_path_factory.mktemp("kld")
    base = open_checkpoint(make_tiny(place / "base", "moe", initializer_range=0.3, shards=1))
    stats = statistics(place / "s", base, EVEN)
    for scheme in ("NVFP4A16", "NVFP4"):
        write_nvfp4(prepare(base, Settings(scheme, "all"), stats), place / scheme)  # type: ignore[arg-type]
    write_nvfp4(prepare(base, Settings("NVFP4", "all", layout="modelopt"), stats), place / "modelopt")
    write_nvfp4(prepare(base, Settings("NVFP4A16", "all", kv="bound"), stats), place / "cache")
    return {name: open_checkpoint(place / name) for name in ("base", "NVFP4A16", "NVFP4", "modelopt", "cache")}


@pytest.fixture(scope="module")
def corpus(folders: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng = np.random.default_rng(0)
    texts = ("".join(chr(c) for c in rng.integers(97, 123, size)) for size in (40, 9, 130, 55))
    lines = [json.dumps({"id": str(i), "class": "a", "text": text}) for i, text in enumerate(texts)]
    file = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    file.write_text("\n".join(lines))
    return load_corpus(file, folders["base"].path)


def direct(base: Checkpoint, candidate: Checkpoint, corpus: Corpus) -> float:
    """Mean KLD of models in memory, one item at a time."""
    models = [load_whole(one, dtype=torch.float32, attention="sdpa", experts="eager") for one in (base, candidate)]
    found = []
    for row in corpus.items:
        with torch.no_grad():
            ids = torch.from_numpy(row.ids.copy())[None]
            a, b = (torch.log_softmax(m(input_ids=ids).logits[0, :-1].double(), -1) for m in models)
        found.append((a.exp() * (a - b)).sum(-1))
    return float(torch.cat(found).mean())


def test_streamed_is_the_model_in_memory(folders: dict[str, Checkpoint], corpus: Corpus) -> None:
    base = folders["base"]
    candidates = [folders[name] for name in ("NVFP4A16", "NVFP4", "modelopt")]
    plain, rounded, other = kld(base, candidates, corpus, FLOAT32)
    # alone, row by row, sums are taken in another order; a rounding that falls the other way moves a token by 1e-4
    assert plain.rows[-1].mean.value == pytest.approx(direct(base, folders["NVFP4A16"], corpus), rel=1e-4)
    assert rounded.rows[-1].mean.value == pytest.approx(direct(base, folders["NVFP4"], corpus), rel=5e-3)
    assert rounded.rows[-1].mean.value > 1.1 * plain.rows[-1].mean.value  # activations cost as well
    assert other.rows == rounded.rows
    assert other.candidate_fingerprint != rounded.candidate_fingerprint
    assert kld(base, [folders["NVFP4A16"]], corpus, FLOAT32) == [plain]  # others beside it change nothing


def test_an_fp8_cache_is_part_of_what_is_measured(folders: dict[str, Checkpoint], corpus: Corpus) -> None:
    """Eight bits of keys and values beside the same four of weights: something, and far less than those cost."""
    weights = kld(folders["base"], [folders["NVFP4A16"]], corpus, FLOAT32)[0].rows[-1]
    cache = kld(folders["NVFP4A16"], [folders["cache"]], corpus, FLOAT32)[0].rows[-1]
    assert 0 < cache.mean.value < 0.5 * weights.mean.value


def test_an_nvfp4_folder_may_be_the_base(folders: dict[str, Checkpoint], corpus: Corpus) -> None:
    row = kld(folders["NVFP4"], [folders["modelopt"]], corpus)[0].rows[-1]
    assert (row.mean.value, row.same_top.value) == (0.0, 1.0)


def test_a_folder_that_does_not_fit_together_stops_nothing_half_way(
    folders: dict[str, Checkpoint], corpus: Corpus, tmp_path: Path
) -> None:
    shutil.copytree(folders["NVFP4"].path, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    del tensors["model.language_model.layers.5.experts.3.up_proj.input_global_scale"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    said: list[str] = []
    with pytest.raises(CheckpointError, match="a tensor is missing"):
        kld(
            folders["base"], [open_checkpoint(tmp_path / "broken")], corpus,
            progress=lambda done, total, label: said.append(label),
        )  # fmt: skip
    assert not said
