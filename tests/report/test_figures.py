"""Every figure renders, is the same twice, and shows text from outside as text."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from tests.report.fixture import BASE, full

from gemcut.report import ReportData
from gemcut.report.figures import draw_all

NAMES = ["criteria", "damage", "sizes", "cut", "specialists", "routing"]
HOSTILE = ("<script>alert(1)</script>", "$\\frac{1}{0}$", "a\x00b", "]]>", "x & y", "ünï 🙂")


@pytest.fixture(scope="module")
def svgs() -> dict[str, str]:
    return {drawing.name: drawing.svg for drawing in draw_all(full())}


def words(svg: str) -> str:
    return " ".join("".join(node.itertext()) for node in ET.fromstring(svg).iter() if node.tag.endswith("text"))


def test_all_figures_are_there(svgs: dict[str, str]) -> None:
    assert list(svgs) == NAMES
    for svg in svgs.values():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "matplotlib v" not in svg.lower()
        assert "<dc:date" not in svg


def test_the_same_bytes_twice(svgs: dict[str, str]) -> None:
    assert {drawing.name: drawing.svg for drawing in draw_all(full())} == svgs


def test_the_same_bytes_in_another_process(svgs: dict[str, str]) -> None:
    program = (
        "import hashlib, sys; from tests.report.fixture import full; from gemcut.report.figures import draw_all;"
        "sys.stdout.write(hashlib.sha256(''.join(d.svg for d in draw_all(full())).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == hashlib.sha256("".join(svgs.values()).encode()).hexdigest()


def test_ids_do_not_collide_between_figures(svgs: dict[str, str]) -> None:
    seen: set[str] = set()
    for svg in svgs.values():
        ids = {node.get("id") for node in ET.fromstring(svg).iter()} - {None}
        assert not ids & seen
        seen |= ids  # type: ignore[arg-type]
        for reference in [v for n in ET.fromstring(svg).iter() for k, v in n.attrib.items() if k.endswith("href")]:
            assert reference.startswith("data:") or reference[1:] in ids


def test_numbers_in_the_figure_are_those_of_the_data(svgs: dict[str, str]) -> None:
    assert "0.0312 [0.0293, 0.0333]" in words(svgs["criteria"])
    assert "n = 240 chunks" in words(svgs["criteria"])
    assert "What was dropped: 96 of 384 experts" in words(svgs["cut"])
    assert "28.26 MiB" in words(svgs["sizes"])
    assert "n = 40" in words(svgs["routing"])


def test_hostile_names_stay_text() -> None:
    data = full(HOSTILE)
    entries = tuple(
        dataclasses.replace(entry, label=f"{HOSTILE[i % len(HOSTILE)]} {i}") for i, entry in enumerate(data.kld)
    )
    hostile = dataclasses.replace(data, kld=entries, chosen=entries[0].label)
    for drawing in draw_all(hostile):
        ET.fromstring(drawing.svg)  # well formed: nothing broke out
        assert "<script" not in drawing.svg
        assert "\x00" not in drawing.svg
    shown = words(next(d.svg for d in draw_all(hostile) if d.name == "damage"))
    assert "<script>alert(1)</script>" in shown
    assert "$\\frac{1}{0}$" in shown


def test_missing_parts_leave_their_figures_out() -> None:
    assert [d.name for d in draw_all(ReportData("dense", BASE, BASE))] == ["sizes"]
    no_kld = dataclasses.replace(full(), kld=(), chosen=None)
    assert [d.name for d in draw_all(no_kld)] == ["sizes", "cut", "specialists", "routing"]
    no_statistics = dataclasses.replace(full(), statistics=None, keep_probability=None)
    assert [d.name for d in draw_all(no_statistics)] == ["criteria", "damage", "sizes", "cut"]


def test_a_wide_spread_of_damage_uses_a_log_axis() -> None:
    data = full()
    rows = tuple(
        dataclasses.replace(row, mean=dataclasses.replace(row.mean, value=3.1, low=2.9, high=3.3))
        for row in data.kld[-2].result.rows
    )
    worst = dataclasses.replace(data.kld[-2], result=dataclasses.replace(data.kld[-2].result, rows=rows))
    wide = dataclasses.replace(data, kld=(*data.kld[:-2], worst, data.kld[-1]))
    assert "log scale" in words(draw_all(wide)[0].svg)
    assert "log scale" not in words(draw_all(data)[0].svg)
