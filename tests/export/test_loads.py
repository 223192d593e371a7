"""The pinned library loads what the exporter wrote, and says with it what the checkpoint itself would say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemcut.checkpoint import open_checkpoint
from gemcut.exporting import GgufWords, plan_export, write_export
from gemcut.ggml.model import Model

DEMO = Path(__file__).parents[2] / "demo"
TYPES = ("F32", "Q8_0", "Q4_K_M", "IQ3_M")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_files_load_agree_and_talk(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(DEMO / name)
    exports = plan_export(checkpoint, GgufWords(TYPES, max_shard_bytes=4_000_000))
    written = write_export(exports, tmp_path, threads=2)[0].files
    tokens: list[int] = []
    tops: dict[str, np.ndarray] = {}
    for kind, file in zip(TYPES, written, strict=True):
        assert len(file.parts) > 1  # parts load as one
        with Model(tmp_path / file.parts[0], threads=1, context=512) as model:
            tokens = tokens or [model.bos, *model.tokenise(prompt())][:160]  # type: ignore[list-item]
            logits = model.logits(tokens)
            assert np.isfinite(logits).all()
            tops[kind] = logits.argmax(axis=1)
            said = model.generate(tokens, 16)
            assert len(set(said)) > 1
    agree = {kind: float(np.mean(top == tops["F32"])) for kind, top in tops.items()}
    assert agree["Q8_0"] > 0.95, agree
    assert agree["Q8_0"] >= agree["Q4_K_M"] >= agree["IQ3_M"] > 0.4, agree


def prompt() -> str:
    with open(DEMO / "corpus" / "heldout.jsonl", encoding="utf-8") as f:
        return str(json.loads(f.readline())["text"])
