"""The trained checkpoint that ships: real routing, real tokenizer, the same sums as a plain run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.observe.plain import plain_statistics

from gemcut.checkpoint.read import open_checkpoint
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from gemcut.records.statistics import load_statistics
from gemcut.stream.corpus import load_corpus

DEMO = Path(__file__).parents[2] / "demo"


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO / "moe" / "config.json").exists(), reason="the demo checkpoint is not here")
def test_demo_moe_equals_a_plain_run(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DEMO / "moe")
    corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", DEMO / "moe", max_tokens_per_item=60)
    corpus = replace(corpus, items=corpus.items[:6])
    out = observe(checkpoint, corpus, tmp_path / "stats", settings=ObserveSettings(dtype="float32", batch_tokens=128))
    meta = load_statistics(out).meta
    assert (load_statistics(out).by_class["n"].sum((0, 2)) == meta.top_k * meta.tokens).all()
    for i, wanted in enumerate(plain_statistics(checkpoint.path, corpus, len(meta.layers))):
        found = load_file(out / f"layer-{i:03d}.safetensors")
        for name, value in wanted.items():
            loose = 1e-3 if name.endswith("easy") else 1e-4
            scale = np.abs(value).max()
            np.testing.assert_allclose(found[name], value, rtol=loose, atol=loose * scale, err_msg=f"{i} {name}")
