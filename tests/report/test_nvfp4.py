"""The NVFP4 section of page and card: sizes that add up, errors, damage, and the command that serves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemcut.report import KldEntry, Nvfp4, Nvfp4Part, ReportData, write_report
from gemcut.report.nvfp4 import cost_rows, nvfp4_headline, nvfp4_limits, nvfp4_method, part_rows
from report import fixture

MIB = 1 << 20
SERVE = "vllm serve small-NVFP4 \\\n    --limit-mm-per-prompt '{\"image\":2}'"


def made(measured: bool = True) -> Nvfp4:
    return Nvfp4(
        name="small-NVFP4",
        source="small",
        source_bytes=16 * MIB,
        size_bytes=7 * MIB,
        scheme="NVFP4",
        layout="compressed-tensors",
        asked={"scales": "weighted", "targets": "mlp+experts"},
        parts=(
            Nvfp4Part("mlp", 36, 2 * MIB, 4 * MIB, 9 * MIB // 8, 0.08, ("layers.0.mlp.up_proj", 0.091)),
            Nvfp4Part("experts", 96, 4 * MIB, 8 * MIB, 9 * MIB // 4, 0.083, ("layers.3.experts.2.up_proj", 0.11)),
        ),
        serve=SERVE,
        needs=("vLLM 1.0 or newer.", "W4A4 runs as such on Blackwell alone."),
        left={"matches layers.0": 3},
        borrowed=tuple(f"layers.1.experts.{i}.gate_proj" for i in range(5)),
        corpus="c" * 64,
        kld=KldEntry("small-NVFP4", fixture.kld_result("small-NVFP4", 0.004)) if measured else None,
        against="small",
    )


def test_parts_add_up_to_the_whole() -> None:
    table = part_rows(made())
    assert [row[0] for row in table.rows] == ["mlp", "experts", "everything else", "total"]
    assert table.rows[0] == (
        "mlp", "36", "4.00 MiB", "1.12 MiB", "4.500", "0.0800", "0.0910 (layers.0.mlp.up_proj)"
    )  # fmt: skip
    assert table.rows[2][2:4] == ("4.00 MiB", "3.62 MiB")
    assert table.rows[3][:4] == ("total", "132", "16.00 MiB", "7.00 MiB")
    assert table.chosen == 3


def test_damage_with_its_interval_or_its_absence() -> None:
    one = made()
    assert nvfp4_headline(one).startswith("NVFP4: 7.00 MiB instead of 16.00 MiB (−56.2 %), at a cost of 0.0040 [")
    costs = cost_rows(one)
    assert costs is not None
    assert costs.rows[-1][0] == "all classes"
    bare = made(measured=False)
    assert nvfp4_headline(bare).endswith("What it cost has not been measured.")
    assert cost_rows(bare) is None
    assert "has not been measured" in nvfp4_limits(bare)[0]


def test_borrowers_and_what_stays_are_named() -> None:
    rows = dict(nvfp4_method(made()))
    assert rows["NVFP4"] == "scales weighted; targets mlp+experts"
    assert rows["Linears that stay"] == "3: matches layers.0"
    assert rows["Borrowed scales"].startswith("5 linears of experts")
    assert "layers.1.experts.2.gate_proj, …" in rows["Borrowed scales"]
    assert "layers.1.experts.3" not in rows["Borrowed scales"]


def test_a_corpus_that_chose_the_scales_and_measured_them_is_said() -> None:
    one = made()
    assert one.kld is not None
    same = dataclasses.replace(one, corpus=one.kld.result.corpus_hash)
    assert any("same corpus" in limit for limit in nvfp4_limits(same))
    assert not any("same corpus" in limit for limit in nvfp4_limits(one))


@pytest.mark.parametrize("cut", [False, True])
def test_page_and_card(tmp_path: Path, cut: bool) -> None:
    data, one = fixture.full(), made()
    if cut:
        data = dataclasses.replace(data, nvfp4=one)
    else:
        packed = dataclasses.replace(data.base, name="small-NVFP4", size_bytes=one.size_bytes, hub_id=None)
        assert one.kld is not None
        data = ReportData("Small in NVFP4", data.base, packed, nvfp4=one, kld=(one.kld,))
    files = write_report(data, tmp_path / "report")
    page, card = files.index_html.read_text(), files.card.read_text()
    assert SERVE in card
    assert "vllm serve small-NVFP4" in page
    for need in one.needs:
        assert f"<li>{need}</li>" in page
        assert need in card
    assert ("base_model_relation: quantized" in card) is not cut
    assert ("- vllm\n" in card) is not cut
    assert ("gemcut.load(folder)" in card) is not cut
    assert ("KLD is KL(base ‖ this checkpoint)" in card) is cut, "alone, the report's own tables say it"
    assert "The damage of this cut has not been measured" not in card


def test_a_layout_that_is_not_loaded_has_no_snippet(tmp_path: Path) -> None:
    data, one = fixture.full(), dataclasses.replace(made(), layout="modelopt")
    alone = ReportData("Small", data.base, data.candidate, nvfp4=one)
    card = write_report(alone, tmp_path / "report").card.read_text()
    assert "## How to run" not in card
    assert SERVE in card
