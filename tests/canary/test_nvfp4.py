"""The canary on NVFP4 folders of the trained demo models: sound ones pass, one with swapped nibbles does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemcut.canary import CanarySettings
from gemcut.canary.generate import compute_dtype
from gemcut.canary.run import against, base_of
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.observe.run import observe
from gemcut.records.canary import Answers
from gemcut.stream.corpus import load_corpus

DEMO = Path(__file__).parents[2] / "demo"
SETTINGS = CanarySettings(max_new_tokens=8)


def quantised(kind: str, scheme: str, place: Path) -> Checkpoint:
    base, stats = open_checkpoint(DEMO / kind), None
    if scheme == "NVFP4":
        corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", base.path, max_tokens=4000)
        stats = observe(base, corpus, place / "stats")
    settings = Settings(scheme, "all", max_borrowed=0.9)  # type: ignore[arg-type]
    write_nvfp4(prepare(base, settings, stats), place / "out")
    return open_checkpoint(place / "out")


@pytest.fixture(scope="module")
def answers() -> dict[str, Answers]:
    return {kind: base_of(open_checkpoint(DEMO / kind), SETTINGS) for kind in ("dense", "moe")}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), [("dense", "NVFP4"), ("moe", "NVFP4A16"), ("moe", "NVFP4")])
def test_sound_folders_pass(kind: str, scheme: str, answers: dict[str, Answers], tmp_path: Path) -> None:
    found = against(answers[kind], quantised(kind, scheme, tmp_path), SETTINGS)
    assert found.passed
    assert found.base_sound
    ratios = [c.nll_ratio.value for c in found.conditions if c.nll_ratio is not None]
    assert len(ratios) == 6
    assert all(ratio != 1 for ratio in ratios)


@pytest.mark.slow
def test_nibbles_in_the_wrong_order_fail(answers: dict[str, Answers], tmp_path: Path) -> None:
    good = quantised("dense", "NVFP4A16", tmp_path)
    shutil.copytree(good.path, tmp_path / "wrong")
    for shard in (tmp_path / "wrong").glob("*.safetensors"):
        state = load_file(shard)
        for name in state:
            if name.endswith("mlp.down_proj.weight_packed"):
                state[name] = state[name] >> 4 | state[name] << 4
        shard.unlink()
        save_file(state, shard, metadata={"format": "pt"})
    found = against(answers["dense"], open_checkpoint(tmp_path / "wrong"), SETTINGS)
    assert not found.passed


def test_a_folder_computes_in_the_dtype_of_its_base(tmp_path: Path) -> None:
    found = quantised("dense", "NVFP4A16", tmp_path)
    assert compute_dtype(found, CanarySettings()) is torch.float32
    big = open_checkpoint(DEMO / "dense")
    assert compute_dtype(found, CanarySettings(dtype="bfloat16")) is compute_dtype(
        big, CanarySettings(dtype="bfloat16")
    )
