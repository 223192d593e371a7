from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import make_tiny

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.layout import layout_of
from gemcut.export.mix.measure import Damages, load_damages, measure_damages, save_damages
from gemcut.export.mix.shapes import quantisable
from gemcut.export.mix.solver import solve
from gemcut.export.targets import units
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.quantise import dequantise, quantise
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.records.curvature import Curvature, Margins
from gemcut.types import F32

KINDS = (GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.IQ2_XS)
WIDE = {"hidden_size": 256, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


class Flat:
    """Importances that grow along the columns."""

    def __init__(self, layout: GgufLayout, slope: float = 1.0) -> None:
        self.widths = {t.name: t.shape[-1] for t in layout.tensors if t.name != "token_embd.weight"}
        self.slope = slope

    def importance(self, name: str, unit: int = 0) -> F32 | None:
        if name not in self.widths:
            return None
        return (1 + self.slope * np.arange(self.widths[name]) + unit).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("measure") / "moe", "moe", **WIDE))


@pytest.fixture(scope="module")
def layout(model: Checkpoint) -> GgufLayout:
    return layout_of(model)


@pytest.fixture(scope="module")
def curved(model: Checkpoint, layout: GgufLayout) -> Curvature:
    rng = np.random.default_rng(0)
    tensors = {}
    for tensor in layout.tensors:
        if quantisable(tensor):
            rows = rng.uniform(0.5, 2, (units(tensor), tensor.shape[-2]))
            columns = rng.uniform(0.5, 2, (units(tensor), tensor.shape[-1]))
            tensors[str(tensor.source)] = Margins(rows, columns / columns.sum(1, keepdims=True) * rows.sum(1)[:, None])
    return Curvature(tensors, 100, 1, 4, "float32", 0, model.fingerprint, "c" * 64, fingerprint="f" * 64)


def by_hand(model: Checkpoint, layout: GgufLayout, curved: Curvature, name: str, kind: GgmlType) -> float:
    """The formula, on all rows at once."""
    tensor = next(t for t in layout.tensors if t.name == name)
    raw = model.read(str(tensor.source)).view("<u2").astype(np.uint32) << 16
    weights = raw.view(np.float32).reshape(-1, *tensor.shape[-2:])
    one, total = curved.tensors[str(tensor.source)], 0.0
    for unit, values in enumerate(weights):
        out = np.empty(tensor_bytes(kind, values.shape), np.uint8)
        quantise(np.ascontiguousarray(values), kind, Flat(layout).importance(name, unit), out)
        square = (values - dequantise(out, kind, values.shape)).astype(np.float64) ** 2
        total += float(one.rows[unit] @ square @ one.columns[unit]) / one.rows[unit].sum()
    return total / (2 * curved.tokens)


@pytest.fixture(scope="module")
def damages(model: Checkpoint, layout: GgufLayout, curved: Curvature) -> Damages:
    return measure_damages(model, layout, curved, Flat(layout), kinds=KINDS)


def test_the_formula(model: Checkpoint, layout: GgufLayout, curved: Curvature, damages: Damages) -> None:
    seen = 0
    for (name, kind), value in damages.values.items():
        if name.startswith("blk.0.ffn") or "attn_k" in name or name == "token_embd.weight":
            assert value == pytest.approx(by_hand(model, layout, curved, name, kind), rel=1e-4)
            seen += 1
    assert seen > 15
    assert {name for name, _ in damages.values} == {t.name for t in layout.tensors if quantisable(t)}


def test_more_bits_do_less_damage(damages: Damages) -> None:
    for name in damages.importance:
        assert damages.values[name, GgmlType.Q8_0] < 0.1 * damages.values[name, GgmlType.Q5_0]
        assert damages.values[name, GgmlType.Q5_0] < damages.values[name, GgmlType.Q4_0]


def test_types_that_want_importances_are_left_out_without(
    model: Checkpoint, layout: GgufLayout, curved: Curvature, damages: Damages
) -> None:
    plain = measure_damages(model, layout, curved, kinds=KINDS)
    assert not [key for key in plain.values if key[1] is GgmlType.IQ2_XS]
    assert ("token_embd.weight", GgmlType.IQ2_XS) not in damages.values  # it never has importances
    assert ("blk.0.attn_q.weight", GgmlType.IQ2_XS) in damages.values
    with pytest.raises(UsageError, match="no type of the mix fits"):
        measure_damages(model, layout, curved, kinds=(GgmlType.IQ2_XS,))


def test_a_sample_of_rows_is_near_the_whole(
    model: Checkpoint, layout: GgufLayout, curved: Curvature, damages: Damages
) -> None:
    few = measure_damages(model, layout, curved, Flat(layout), kinds=KINDS, sample_elements=8 * 256)
    ratios = [few.values[key] / damages.values[key] for key in damages.values]
    assert 0.9 < np.mean(ratios) < 1.1
    assert max(ratios) < 3
    assert any(few.values[key] != damages.values[key] for key in damages.values)


def test_threads_change_nothing(model: Checkpoint, layout: GgufLayout, curved: Curvature, damages: Damages) -> None:
    assert measure_damages(model, layout, curved, Flat(layout), kinds=KINDS, threads=3).values == damages.values


def test_what_was_measured_is_not_measured_again(
    model: Checkpoint, layout: GgufLayout, curved: Curvature, damages: Damages, tmp_path: Path
) -> None:
    save_damages(damages, tmp_path / "damages.json")
    read = load_damages(tmp_path / "damages.json")
    assert (dict(read.values), dict(read.importance)) == (dict(damages.values), dict(damages.importance))
    marked = replace(read, values=dict.fromkeys(read.values, 7.0))
    kept = measure_damages(model, layout, curved, Flat(layout), kinds=KINDS, earlier=marked)
    assert set(kept.values.values()) == {7.0}
    more = measure_damages(model, layout, curved, Flat(layout), kinds=(*KINDS, GgmlType.Q5_1), earlier=marked)
    assert {value for (_, kind), value in more.values.items() if kind is not GgmlType.Q5_1} == {7.0}
    other = measure_damages(model, layout, curved, Flat(layout, 2.0), kinds=KINDS, earlier=marked)
    assert {name for (name, _), value in other.values.items() if value == 7.0} == {"token_embd.weight"}
    fresh = measure_damages(
        model, layout, replace(curved, fingerprint="g" * 64), Flat(layout), kinds=KINDS, earlier=marked
    )
    assert 7.0 not in fresh.values.values()


def test_it_can_be_solved(layout: GgufLayout, damages: Damages) -> None:
    solution = solve(layout, damages.values, 4_000_000)
    assert solution.least_bytes <= solution.size_bytes <= 4_000_000


def test_curvature_of_another_model_is_refused(model: Checkpoint, layout: GgufLayout, curved: Curvature) -> None:
    with pytest.raises(CheckpointError, match="of another model"):
        measure_damages(model, layout, replace(curved, model_fingerprint="x" * 64), kinds=KINDS)
    with pytest.raises(CheckpointError, match="lacks a tensor"):
        measure_damages(model, layout, replace(curved, tensors={}), kinds=KINDS)
    narrow = {name: Margins(one.rows[:, :-1], one.columns) for name, one in curved.tensors.items()}
    with pytest.raises(CheckpointError, match="of another model"):
        measure_damages(model, layout, replace(curved, tensors=narrow), kinds=KINDS)


@pytest.mark.parametrize("bad", ['{"Q4_0": -1.0}', '{"Q4_0": "much"}', '{"Q9_K": 1.0}', '{"Q4_0": 1e999}'])
def test_damaged_records_are_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "damages.json"
    save_damages(Damages({("a", GgmlType.Q4_0): 1.0}, {"a": ""}, {"model": "m"}), path)
    assert load_damages(path).values == {("a", GgmlType.Q4_0): 1.0}
    body = json.loads(path.read_text())
    body["tensors"]["a"]["damage"] = "HERE"
    path.write_text(json.dumps(body).replace('"HERE"', bad))
    with pytest.raises(CheckpointError):
        load_damages(path)
