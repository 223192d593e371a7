"""What changed, as rows: grouped over layers, and bytes that add up."""

from __future__ import annotations

from tests.report.fixture import full

from gemcut.report import changes as t


def test_components_sum_to_the_total() -> None:
    data = full()
    assert sum(data.base.components.values()) == data.base.size_bytes
    assert sum(data.candidate.components.values()) == data.candidate.size_bytes
    rows = t.component_rows(data.base, data.candidate).rows
    assert rows[-1] == ("total", "28.26 MiB", "23.31 MiB", "−17.5 %")


def test_changes_are_grouped_over_layers() -> None:
    table = t.change_rows(full())
    assert table is not None
    assert table.rows[0] == (
        "model.language_model.layers.*.experts.gate_up_proj", "0–11 (12)", "–", "take", "[32, 352, 256]",
        "[24, 352, 256]", "–",
    )  # fmt: skip


def test_layers_are_told_as_ranges() -> None:
    assert t.spans([]) == "–"
    assert t.spans([4]) == "4"
    assert t.spans([3, 0, 1, 2, 7, 9, 8]) == "0–3, 7–9 (7)"
