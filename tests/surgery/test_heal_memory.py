"""The estimates against what a heal of the demo model really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.surgery.heal_demo import head_plan

from gemcut.checkpoint.read import open_checkpoint
from gemcut.surgery.heal.memory import heal_disk_bytes, heal_memory_bytes
from gemcut.surgery.heal.settings import HealSettings

DEMO = Path(__file__).parents[2] / "demo"

RUN = """
import json, sys
from pathlib import Path
from gemcut.checkpoint.read import open_checkpoint
from gemcut.stream.corpus import load_corpus
from gemcut.surgery.heal.settings import HealSettings
from gemcut.surgery.heal.stream import heal
from gemcut.types import LayerPlan, Plan

demo, out = Path(sys.argv[1]), Path(sys.argv[2])
base = open_checkpoint(demo / "dense")
corpus = load_corpus(demo / "corpus" / "calibration.jsonl", base.path, max_tokens=16_000)
plan = Plan("heads", base.fingerprint, 8, {i: LayerPlan(tuple(range(7)), {7: "by hand"}) for i in (0, 5)})
disk = [0]
def look(done, total, label):
    disk[0] = max(disk[0], sum(p.stat().st_size for p in out.parent.rglob("*") if p.is_file()))
heal(base, plan, corpus, out, settings=HealSettings(dtype="float32"), progress=look)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
json.dump({"peak": peak, "disk": disk[0], "tokens": corpus.tokens}, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs VmHWM")
def test_a_heal_stays_below_its_estimates(tmp_path: Path) -> None:
    run = [sys.executable, "-c", RUN, str(DEMO), str(tmp_path / "heal")]
    found = json.loads(subprocess.run(run, capture_output=True, check=True).stdout)
    base = open_checkpoint(DEMO / "dense")
    plan, settings = head_plan(base, {0: (7,), 5: (7,)}), HealSettings(dtype="float32")
    estimate = heal_memory_bytes(base, plan, settings)
    assert estimate / 4 < found["peak"] < estimate
    disk = heal_disk_bytes(base, plan, settings, tokens=found["tokens"])
    assert disk / 3 < found["disk"] < disk


def test_what_the_estimate_grows_with() -> None:
    base = open_checkpoint(DEMO / "dense")
    one, all_layers = head_plan(base, {0: (7,)}), head_plan(base, dict.fromkeys(range(12), (7,)))
    settings = HealSettings(dtype="float32")
    assert heal_memory_bytes(base, one, settings) < heal_memory_bytes(base, all_layers, settings)  # wide layer 5
    single = HealSettings(dtype="float32", ridges=(1e-2,))
    assert heal_memory_bytes(base, one, single) == heal_memory_bytes(base, one, settings)
    assert heal_disk_bytes(base, one, single, tokens=1000) < heal_disk_bytes(base, one, settings, tokens=1000)
    assert heal_memory_bytes(base, one, settings, longest=8192) > heal_memory_bytes(base, one, settings)
    local = HealSettings(dtype="float32", method="local")
    assert heal_disk_bytes(base, one, local, tokens=1000) < heal_disk_bytes(base, one, settings, tokens=1000)
