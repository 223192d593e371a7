"""`heal.json`: what is written reads back, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.records.heal import HEAL_FILE, ClassResidual, HealReport, LayerHeal, load_heal, save_heal

TENSOR = "model.layers.3.self_attn.o_proj.weight"
USED = LayerHeal(
    layer=3, tensor=TENSOR, units=4, head_dim=16, kept=(0, 1, 3), samples=800, held_out_samples=100, ridge=1e-2,
    lam=0.5, ridge_residuals={"0.01": 0.2, "0.1": 0.25}, condition=120.0, fit_before=0.4, fit_after=0.1,
    held_out_before=0.4, held_out_after=0.2, used=True, file="layer-003.safetensors", blake3="a" * 64,
    by_class={"code": ClassResidual(0.5, 0.3, 60), "math": ClassResidual(0.2, 0.1, 40)}, held_out_uncut=0.15,
)  # fmt: skip
UNUSED = LayerHeal(
    layer=5, tensor=TENSOR.replace("3", "5"), units=4, head_dim=16, kept=(0, 1, 2, 3), samples=800,
    held_out_samples=100, ridge=1e-2, lam=0.5, ridge_residuals={}, condition=120.0, fit_before=0.1, fit_after=0.1,
    held_out_before=0.1, held_out_after=0.1, used=False, file=None, blake3=None, by_class={},
)  # fmt: skip
REPORT = HealReport(
    fingerprint="b" * 64, method="sequential", model_fingerprint="c" * 64, model_name="demo", plan_fingerprint="d" * 64,
    corpus_hash="e" * 64, template_hash="f" * 64, bos_policy="text: added", settings={"every": 8, "ridges": [0.01]},
    dtype="float32", items=16, held_out_items=2, tokens=900, layers=(USED, UNUSED), stack={"torch": "2"},
)  # fmt: skip


def test_reads_back(tmp_path: Path) -> None:
    save_heal(REPORT, tmp_path / HEAL_FILE)
    assert load_heal(tmp_path / HEAL_FILE) == REPORT
    assert REPORT.used == (3,)
    assert USED.dropped == (2,)
    assert UNUSED.dropped == ()


def test_harm_is_the_layers_own() -> None:
    """Squares of residuals: with its heal, less what the layers before lost; without a heal that is used, the cut's."""
    assert USED.harm == pytest.approx(0.2**2 - 0.15**2)
    assert dataclasses.replace(USED, used=False, held_out_uncut=None).harm == pytest.approx(0.4**2)
    assert UNUSED.harm == pytest.approx(0.1**2)


def changed(value: dict[str, Any], path: str, to: object) -> dict[str, Any]:
    *parents, last = path.split(".")
    at: Any = value
    for key in parents:
        at = at[int(key) if key.isdigit() else key]
    at[last] = to
    return value


@pytest.mark.parametrize(
    ("path", "to"),
    [("schema", 1), ("method", "global"), ("fingerprint", "short"), ("layers.0.used", False), ("layers.0.used", 1),
     ("layers.0.file", None), ("layers.0.file", "../layer-003.safetensors"), ("layers.0.file", "/etc/passwd"),
     ("layers.0.blake3", "A" * 64), ("layers.0.kept", [0, 4]), ("layers.0.kept", [0, 0]), ("layers.0.layer", 5),
     ("layers.0.layer", 6), ("layers.0.condition", "large"), ("layers.0.units", 0), ("layers.1.file", "x.safetensors"),
     ("layers.0.samples", -1), ("layers.0.ridge_residuals", {"0.1": None}),
     ("layers.0.by_class.code.before", "small"), ("layers.0.by_class.code.samples", 0), ("layers.0.by_class.code", 0.5),
     ("layers.0.by_class.code.more", 1), ("layers.0.by_class", []),
     ("layers.0.held_out_uncut", "none"), ("unknown", 1), ("tokens", True)],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, path: str, to: object) -> None:
    save_heal(REPORT, tmp_path / HEAL_FILE)
    value = json.loads((tmp_path / HEAL_FILE).read_text())
    (tmp_path / HEAL_FILE).write_text(json.dumps(changed(value, path, to)))
    with pytest.raises(CheckpointError):
        load_heal(tmp_path / HEAL_FILE)


def test_no_record_and_no_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no heal"):
        load_heal(tmp_path / HEAL_FILE)
    broken = dataclasses.replace(REPORT, layers=(dataclasses.replace(USED, condition=float("nan")),))
    with pytest.raises(QualityError, match="not finite"):
        save_heal(broken, tmp_path / HEAL_FILE)
