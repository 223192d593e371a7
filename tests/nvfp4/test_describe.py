"""What headers tell of an NVFP4 folder, in both layouts, and that nothing of it can be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.verb import gemcut

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.inspection import inspect
from gemcut.nvfp4.describe import Quantised, describe, weights_by_tensor
from observed import EVEN, statistics
from tiny import make_tiny


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("tiny") / "moe"))


def export(model: Checkpoint, out: Path, settings: Settings, stats: Path | None = None) -> Checkpoint:
    write_nvfp4(prepare(model, settings, stats), out)
    return open_checkpoint(out)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_scheme_layout_and_parts(moe: Checkpoint, tmp_path: Path, layout: str) -> None:
    stats = statistics(tmp_path / "s", moe, EVEN)
    settings = Settings("NVFP4", "all", layout=layout, kv="one")  # type: ignore[arg-type]
    found = export(moe, tmp_path / "out", settings, stats)
    attention = 5 * 4 + 3  # no v_proj in the full layer
    linears = attention + 6 * 3 + 6 * 8 * 3
    parts = ("attention", "dense mlp", "experts")
    assert describe(found) == Quantised("NVFP4", layout, linears, parts, fp8_cache=True)  # type: ignore[arg-type]
    weights = weights_by_tensor(found)
    scales = 6 * 2  # of the cache; those of weights are no weights
    assert sum(weights.values()) == sum(ref.elements for ref in moe.tensors.values()) + scales
    assert found.sites == ()


def test_only_what_is_quantised_is_lost_to_cuts(moe: Checkpoint, tmp_path: Path) -> None:
    assert describe(moe) is None
    before, after = inspect(moe), inspect(export(moe, tmp_path / "out", Settings("NVFP4A16", "mlp+experts")))
    assert [one.kind for one in before.cuttable] == ["experts", "heads"]
    assert not after.cuttable
    assert after.layers == before.layers
    assert after.parameters == before.parameters
    assert {part.name: part.parameters for part in after.components} == {
        part.name: part.parameters for part in before.components
    }
    assert after.quantised is not None
    assert after.quantised.parts == ("dense mlp", "experts")


def test_inspect_and_doctor_say_so(moe: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(moe, tmp_path / "out", Settings("NVFP4A16", "all"))
    code, out, err = gemcut(capsys, "inspect", tmp_path / "out")
    assert code == 0
    said = " ".join((out + err).split())
    assert "NVFP4A16, compressed-tensors layout" in said
    assert "185 linears with weights in NVFP4 (attention, dense mlp, experts)" in said
    assert "What can be cut" not in said
    code, out, err = gemcut(capsys, "doctor")
    assert code == 0
    assert "package_compressed_tensors" in out + err
