"""Counts from headers alone, held against arithmetic; fast on the real tensor count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import synthetic
from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.header import lay_out
from gemcut.inspection import inspect
from gemcut.types import TensorRef


def headers_only(folder: Path, layers: int, geometry: synthetic.Geometry) -> Path:
    """Real-size headers over sparse files: the sizes are there, the bytes are not."""
    folder.mkdir()
    weight_map = {}
    tensors = synthetic.shapes(geometry, layers)
    vision = [
        (f"model.vision_tower.encoder.layers.{k // 13}.part{k % 13}.linear.weight", (1152, 1152)) for k in range(351)
    ]
    per_shard = -(-len(tensors + vision) // 12)
    for number in range(12):
        name = f"model-{number + 1:05d}-of-00012.safetensors"
        part = (tensors + vision)[number * per_shard : (number + 1) * per_shard]
        header = lay_out(name, [TensorRef(n, "BF16", s, name, 0, 0) for n, s in part], {"format": "pt"})
        with open(folder / name, "wb") as f:
            f.write(len(header.raw).to_bytes(8, "little") + header.raw)
            f.truncate(header.size_bytes)
        weight_map.update({n: name for n, _ in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(synthetic.config(geometry, layers)))
    return folder


def test_the_real_26b_geometry(tmp_path: Path) -> None:
    folder = headers_only(tmp_path / "26b", 30, synthetic.Geometry(vocabulary=262144))
    found = inspect(open_checkpoint(folder))
    # 1013 tensors as published: 657 of the text model, the rest vision
    assert found.tensors == 657 + 351
    parts = {part.name: part for part in found.components}
    assert parts["experts"].parameters == 30 * 128 * 3 * 704 * 2816
    assert parts["embedding"].parameters == 262144 * 2816
    assert parts["dense mlp"].parameters == 30 * 3 * 2112 * 2816
    assert parts["vision"].tensors == 351
    text = found.parameters - parts["vision"].parameters
    assert round(text / 1e9, 2) == 25.23  # the published size of the text model
    assert sum(part.size_bytes for part in found.components) == found.size_bytes == found.bytes_by_dtype["BF16"]
    assert found.tied_head
    assert found.experts_per_token == 8
    experts, heads = found.cuttable
    assert (experts.kind, experts.units, len(experts.layers), experts.minimum) == ("experts", 128, 30, 8)
    assert experts.parameters_per_unit == 30 * (3 * 704 * 2816 + 2816 + 1)
    # 30 of 128 experts: the published cut goes from 51.6 to 40.9 GB
    assert round(30 * experts.size_bytes_per_unit / 1e9, 1) == 10.7
    assert (heads.units, heads.minimum) == (16, 1)


def test_inspect_is_fast_from_a_cold_start(tmp_path: Path) -> None:
    folder = headers_only(tmp_path / "26b", 30, synthetic.Geometry(vocabulary=262144))
    code = "import sys; from pathlib import Path; from gemcut.checkpoint import open_checkpoint; " \
           "from gemcut.inspection import inspect; " \
           "inspect(open_checkpoint(Path(sys.argv[1]))); assert 'torch' not in sys.modules"  # fmt: skip
    before = os.times()
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
        best = min(best, time.perf_counter() - start)
    after = os.times()
    cpu = (after.children_user + after.children_system - before.children_user - before.children_system) / 3
    assert min(best, cpu) < 0.5  # CPU seconds where the machine is busy with something else


@pytest.mark.slow
def test_dense(tmp_path: Path) -> None:
    from tiny import make_tiny

    found = inspect(open_checkpoint(make_tiny(tmp_path / "m", "dense-text", shards=1)))
    assert found.experts_per_token == 0
    assert [c.kind for c in found.cuttable] == ["heads"]
    assert "experts" not in {part.name for part in found.components}
    assert found.name == "m"
