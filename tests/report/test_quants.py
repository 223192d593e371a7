"""GGUF files in the report: the front, the tables, the pictures."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.report import KldEntry, Quant, Quants, ReportData, write_report
from gemcut.report.bits import Cell
from gemcut.report.pareto import draw_quants
from gemcut.report.quants import (
    class_quant_rows,
    front,
    limits_of,
    make_rows,
    memory_rows,
    on_front,
    quant_rows,
    quants_headline,
    worth,
)
from report import fixture

SIZES = {"Q8_0": (9.0, 0.00005), "Q4_K_M": (5.2, 0.0017), "CD-Q3_K_M": (4.6, 0.012), "3.5MiB": (3.5, 0.009)}
HOW = {"CD-Q3_K_M": "layers", "3.5MiB": "size"}
CELLS = tuple(Cell("attn_q", layer, 3.4 + layer, "IQ3_S", 1000) for layer in range(3))


def made() -> Quants:
    files = []
    for asked, (mib, mean) in SIZES.items():
        result = fixture.kld_result(asked, mean)
        files.append(
            Quant(
                f"small-{asked}.gguf", "model", asked, HOW.get(asked, "stock"), int(mib * 2**20), mib,  # type: ignore[arg-type]
                "" if asked == "Q8_0" else "hybrid", {"Q4_K": 3}, {f"small-{asked}.gguf": "0" * 64},
                KldEntry(asked, result), 0.01 if asked == "3.5MiB" else None,
                {"KV cache": 1 << 20} if asked == "3.5MiB" else {}, CELLS,
            )
        )  # fmt: skip
    files.append(Quant("mmproj-small-F16.gguf", "mmproj", "F16", "stock", 1 << 20, 16.0))
    floor = KldEntry("BF16 (noise floor)", fixture.kld_result("floor", 0.000002))
    return Quants(tuple(files), "small", 16 << 20, "small", floor)


points = st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_nobody_beats(found: list[tuple[float, float]]) -> None:
    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in found)

    assert {found[i] for i in front(found)} == {one for one in found if not beaten(one)}
    assert [found[i][0] for i in front(found)] == sorted(found[i][0] for i in front(found))


def test_tables_say_every_file_and_the_floor() -> None:
    quants = made()
    table = quant_rows(quants)
    assert [row[0] for row in table.rows] == [
        "small-Q8_0.gguf", "small-Q4_K_M.gguf", "small-CD-Q3_K_M.gguf", "small-3.5MiB.gguf", "mmproj-small-F16.gguf",
        "BF16 (noise floor)",
    ]  # fmt: skip
    assert on_front(quants) == {"small-Q8_0.gguf", "small-Q4_K_M.gguf", "small-3.5MiB.gguf"}
    column = table.columns.index("On the front")
    assert [row[column] for row in table.rows] == ["yes", "yes", "", "yes", "", ""]
    assert table.rows[0][table.columns.index("Importances")] == "–"
    assert re.search(r"\[0\.\d+, 0\.\d+\]", table.rows[1][table.columns.index("Mean KLD, nats")])
    assert [row[0] for row in quant_rows(quants, short=True).rows][4] == "mmproj F16"
    by_class = class_quant_rows(quants)
    assert by_class is not None
    assert by_class.columns[1:] == fixture.CLASSES
    assert make_rows(quants).rows[3][3:] == ("0.0100", f"{quants.models[3].row.mean.value:.4f}")  # type: ignore[union-attr]
    memory = memory_rows(quants)
    assert memory is not None
    assert memory.rows[0][1:] == ("3.50 MiB", "1.00 MiB", "4.50 MiB")


def test_nothing_measured_says_so() -> None:
    bare = dataclasses.replace(made(), files=tuple(dataclasses.replace(f, kld=None) for f in made().files), floor=None)
    assert "has not been measured" in quants_headline(bare)
    assert "not been measured" in limits_of(bare)[0]
    assert "Mean KLD, nats" not in quant_rows(bare).columns
    assert not [one for one in draw_quants(bare) if not one.name.startswith("bits")]
    assert worth(bare).role == "model"


def test_pictures_mark_the_front_and_name_every_file() -> None:
    drawings = {one.name: one for one in draw_quants(made())}
    assert set(drawings) == {"quants-kld", "quants-top", "bits-cd-q3-k-m", "bits-3-5mib"}
    for name in ("quants-kld", "quants-top"):
        ElementTree.fromstring(drawings[name].svg)
        for asked in SIZES:
            assert asked in drawings[name].svg
        assert "mathdefault" not in drawings[name].svg
    assert "noise floor" in drawings["quants-kld"].svg
    assert [one.svg for one in draw_quants(made())] == [one.svg for one in draw_quants(made())]


@pytest.mark.parametrize("cut", [False, True])
def test_page_and_card(tmp_path: object, cut: bool) -> None:
    data = fixture.full()
    if not cut:
        data = ReportData("Small in GGUF", data.base, data.base, commands=("gemcut run small",))
    files = write_report(dataclasses.replace(data, quants=made()), tmp_path / "report")  # type: ignore[operator]
    page, card = files.index_html.read_text(), files.card.read_text()
    assert ("GGUF files" if cut else "What each file weighs and costs") in page
    assert ("library_name: transformers" if cut else "library_name: gguf") in card
    assert "--mmproj mmproj-small-F16.gguf" in card
    assert "figures/quants-kld.svg" in card
    assert ("What it saved" in page) is cut
    assert ("What it cost" in page) is cut
