"""A heal in tables: by layer, and by class of text, where a calibration too narrow shows."""

from __future__ import annotations

from dataclasses import replace

from gemcut.records.heal import ClassResidual, HealReport, LayerHeal
from gemcut.report.heals import heal_checks, heal_tables

LAYER = LayerHeal(
    layer=0, tensor="o_proj", units=8, head_dim=32, kept=(0, 1, 2, 3, 4, 5, 6), samples=1200, held_out_samples=200,
    ridge=0.01, lam=0.5, ridge_residuals={"0.01": 0.3}, condition=1e4, fit_before=0.4, fit_after=0.2,
    held_out_before=0.4, held_out_after=0.3, used=True, file="layer-000.safetensors", blake3="0" * 64,
    by_class={"code": ClassResidual(0.4, 0.2, 150), "math": ClassResidual(0.3, 0.31, 50)},
)  # fmt: skip
UNUSED = replace(LAYER, layer=2, used=False, file=None, blake3=None, held_out_after=0.5)
REPORT = HealReport(
    "a" * 64, "sequential", "b" * 64, "base", "c" * 64, "d", "e", "bos", {}, "float32", 48, 6, 1400,
    (LAYER, replace(LAYER, layer=1, by_class={"code": ClassResidual(0.6, 0.4, 150)}), UNUSED), {},
)  # fmt: skip


def test_layers_in_order_and_whether_they_are_used() -> None:
    table = heal_tables(REPORT, "heads")[0].table
    assert [row[0] for row in table.rows] == ["0", "1", "2"]
    assert [row[-1] for row in table.rows] == ["yes", "yes", "no"]
    assert table.rows[0][1:4] == ("7", "1,200", "0.01")


def test_the_text_says_what_was_refitted() -> None:
    assert "each output projection refitted" in heal_tables(REPORT, "heads")[0].text
    assert "the scales of the experts that stay refitted" in heal_tables(REPORT, "experts")[0].text
    down = replace(REPORT, settings={"experts": "down_proj"})
    assert "the output projections of the experts that stay refitted" in heal_tables(down, "experts")[0].text


def test_classes_are_means_over_used_layers_and_name_where_they_lose() -> None:
    extra = heal_tables(REPORT, "heads")[1]
    assert "2 layers" in extra.text
    assert extra.table.rows == (
        ("code", "150", "0.5000", "0.3000", "−40.0 %", "–"),
        ("math", "50", "0.3000", "0.3100", "+3.3 %", "0"),
    )


def test_without_classes_or_a_used_layer_there_is_no_second_table() -> None:
    for layers in ((replace(LAYER, by_class={}),), (UNUSED,)):
        assert [one.title for one in heal_tables(replace(REPORT, layers=layers), "experts")] == ["Heal, layer by layer"]
    assert heal_tables(None, "heads") == ()


def test_the_check_counts_what_is_used() -> None:
    assert "used in 2 of 3 layers; mean held-out residual 0.4000 → 0.3000" in heal_checks(REPORT)[0].detail
    assert "none is used" in heal_checks(replace(REPORT, layers=(UNUSED,)))[0].detail
    assert heal_checks(None) == ()
