"""The estimate is an upper bound that a real process keeps, and not a useless one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tiny import make_tiny

from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.observe.memory import observe_disk_bytes, observe_memory_bytes
from gemcut.observe.settings import ObserveSettings

Tiny = Callable[[str], Checkpoint]
BASE = ObserveSettings()

CHILD = """
import sys
from pathlib import Path
import torch
from gemcut.checkpoint.read import open_checkpoint
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from tests.observe.conftest import make_corpus
torch.set_num_threads(1)
observe(open_checkpoint(Path(sys.argv[1])), make_corpus(12, longest=500), Path(sys.argv[2]), settings=ObserveSettings())
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_grows_with_what_it_is_made_of(tiny: Tiny) -> None:
    moe = observe_memory_bytes(tiny("moe"), BASE)
    assert observe_memory_bytes(tiny("moe"), replace(BASE, dtype="float32")) > moe
    assert observe_memory_bytes(tiny("moe"), replace(BASE, batch_tokens=8192)) > moe
    assert observe_memory_bytes(tiny("moe"), BASE, longest=9000) > moe
    assert observe_memory_bytes(tiny("dense"), BASE) < moe


def test_layers_do_not_add_up(tmp_path: Path) -> None:
    """The peak is one layer, however many there are; the disk holds all."""
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    deep = open_checkpoint(make_tiny(tmp_path / "deep", num_hidden_layers=12, layer_types=kinds))
    shallow = open_checkpoint(make_tiny(tmp_path / "shallow"))
    assert observe_memory_bytes(deep, BASE) == observe_memory_bytes(shallow, BASE)
    disk = [observe_disk_bytes(c, BASE, tokens=0, questions=10) for c in (shallow, deep)]
    assert disk[1] > 1.5 * disk[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs VmHWM")
def test_a_real_pass_stays_below_the_estimate(tmp_path: Path) -> None:
    wide = {
        "hidden_size": 512,
        "head_dim": 64,
        "global_head_dim": 128,
        "num_attention_heads": 16,
        "intermediate_size": 1024,
    }
    folder = make_tiny(tmp_path / "wide", num_experts=64, moe_intermediate_size=128, **wide)
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "stats")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * 1024
    estimate = observe_memory_bytes(open_checkpoint(folder), BASE, longest=500)
    assert 0.4 * estimate < peak < estimate
