"""The model card: front matter that parses, numbers that equal the data, the order that readers know."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest
import yaml
from tests.report.fixture import BASE, full
from tests.report.test_html import EVIL, hostile

from gemcut.report import ReportData
from gemcut.report.card import comparison, render_card
from gemcut.report.figures import draw_all
from gemcut.report.spelling import change, interval, size
from gemcut.report.tables import criteria_rows, headline
from gemcut.report.text import find_path


def matter(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    loaded = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def cells(card: str, first: str) -> list[str]:
    line = next(line for line in card.split("\n") if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_front_matter() -> None:
    assert matter(render_card(full())) == {
        "license": "apache-2.0",
        "base_model": "example/gemma-4-demo-moe",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemcut", "pruned", "expert-pruning", "moe"],
    }


def test_an_unknown_licence_is_left_out_and_said() -> None:
    data = dataclasses.replace(full(), base=dataclasses.replace(BASE, licence=None, hub_id=None))
    card = render_card(data)
    assert not {"license", "base_model"} & set(matter(card))
    assert "**None is stated by the base" in card


@pytest.mark.parametrize("licence", ["gemma: yes", "- x", "'", "a\nb: c", "no"])
def test_front_matter_cannot_be_broken_by_the_licence(licence: str) -> None:
    data = dataclasses.replace(full(), base=dataclasses.replace(BASE, licence=licence))
    assert matter(render_card(data))["license"] == licence


def test_sections_come_in_the_order_that_readers_know() -> None:
    titles = re.findall(r"^## (.+)$", render_card(full()), re.M)
    assert titles == [
        "What changed", "Against the base", "How to run", "Method", "Limits", "Files", "Reproduce", "Licence",
    ]  # fmt: skip


def test_numbers_equal_the_data() -> None:
    data = full()
    card = render_card(data)
    before, after = data.base.size_bytes, data.candidate.size_bytes
    assert cells(card, "Size on disk") == ["Size on disk", size(before), size(after), change(before, after)]
    assert cells(card, "Experts per layer")[1:] == ["32", "24", "−8"]
    row = data.entry.row() if data.entry else None
    assert row is not None
    name = "Mean KLD from the base, nats per token (n = 240 chunks)"
    assert cells(card, name)[1:] == ["0 [0, 0]", interval(row.mean), interval(row.mean, sign=True)]
    low, high = (float(text) for text in re.findall(r"[\d.]+", cells(card, name)[2])[1:])
    assert low == pytest.approx(row.mean.low, abs=6e-5)
    assert high == pytest.approx(row.mean.high, abs=6e-5)
    assert headline(data) in card
    assert data.manifest is not None
    for file, digest in data.manifest.files.items():
        assert f"| `{file}` | `{digest}` |" in card


def test_every_measured_number_of_the_comparison_has_its_n() -> None:
    for name, _, cut, delta in comparison(full()).rows:
        assert ("[" in cut) == ("[" in delta) == ("(n = " in name)


def test_every_candidate_is_listed() -> None:
    data = full()
    card, table = render_card(data), criteria_rows(data)
    assert table is not None
    for row in table.rows:
        assert row[1] in card


def test_nothing_measured_nothing_claimed() -> None:
    card = render_card(dataclasses.replace(full(), kld=(), chosen=None, manifest=None, checks=()))
    assert "KLD from the base" not in card
    assert "has not been measured" in card
    assert "have not been compared" in card
    assert render_card(ReportData("x", BASE, BASE)).count("## ") == 8


def test_the_snippet_is_python_and_names_the_folder() -> None:
    data = dataclasses.replace(full(), candidate=dataclasses.replace(full().candidate, name='o"dd\nname'))
    code = re.search(r"```python\n(.*?)\n```", render_card(data), re.S)
    assert code is not None
    folder = next(n for n in ast.walk(ast.parse(code.group(1))) if isinstance(n, ast.Assign))
    assert ast.literal_eval(folder.value) == 'o"dd\nname'


def test_hostile_text_is_text() -> None:
    data = hostile()
    card = render_card(data, draw_all(data), "figures")
    outside_code = re.sub(r"(?s)```.*?```|`[^`]*`", "", card.split("---\n", 2)[2])
    assert not re.search(r"(?<!\\)<", outside_code)
    assert EVIL in card  # in the code blocks, where it is inert
    assert find_path(card) is None
    assert "ann" not in re.findall(r"\bann\b", card)


def test_pictures_only_where_their_folder_is_given() -> None:
    data = full()
    assert "](figures/criteria.svg)" in render_card(data, draw_all(data), "figures")
    assert ".svg" not in render_card(data, draw_all(data))


def test_no_hash_of_the_card_that_this_one_replaces() -> None:
    data = full()
    assert data.manifest is not None
    files = {**data.manifest.files, "README.md": "0" * 64}
    card = render_card(dataclasses.replace(data, manifest=dataclasses.replace(data.manifest, files=files)))
    assert "| `README.md` |" not in card
    assert all(f"| `{name}` | `{digest}` |" in card for name, digest in data.manifest.files.items())
