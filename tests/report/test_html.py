"""One page, nothing loaded, nothing executed, everything escaped."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from tests.report.fixture import BASE, full

from gemcut.report import Check, CriterionNote, ReportData, StageTime
from gemcut.report.figures import draw_all
from gemcut.report.html import render_page
from gemcut.report.text import find_path

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Collects tags and text, and that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def hostile() -> ReportData:
    data = full(("code", EVIL))
    assert data.plan is not None
    assert data.manifest is not None
    drop = {layer: dataclasses.replace(p, drop=dict.fromkeys(p.drop, EVIL)) for layer, p in data.plan.layers.items()}
    return dataclasses.replace(
        data,
        title=EVIL,
        base=dataclasses.replace(data.base, name=EVIL, architecture=EVIL, components={EVIL: 5, **data.base.components}),
        candidate=dataclasses.replace(data.candidate, name=EVIL),
        plan=dataclasses.replace(data.plan, layers=drop, params={EVIL: EVIL}),
        kld=tuple(dataclasses.replace(entry, note=EVIL) for entry in data.kld),
        manifest=dataclasses.replace(data.manifest, files={EVIL: "0" * 64}, config_changes={EVIL: (EVIL, [EVIL])}),
        checks=(Check(EVIL, False, EVIL),),
        stages=(StageTime(EVIL, 1.0, 5),),
        recipe=EVIL + "\nbase: /home/ann/secret/base\n",
        commands=(EVIL, "gemcut cut /home/ann/secret/base"),
        versions={EVIL: EVIL},
        criteria=(CriterionNote("class_rank", EVIL, EVIL),),
        calibration_corpus=EVIL,
        notes=(EVIL,),
        limits=(EVIL,),
    )


@pytest.fixture(scope="module")
def page() -> str:
    data = full()
    return render_page(data, draw_all(data))


def test_the_page_is_self_contained(page: str) -> None:
    reader = Reader(page)
    assert not reader.open
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert [name for name, _ in reader.tags].count("svg") == 6


def test_hostile_text_is_text() -> None:
    data = hostile()
    text = render_page(data, draw_all(data))
    reader = Reader(text)
    assert "script" not in {name for name, _ in reader.tags}
    assert not [name for tag, attrs in reader.tags for name in attrs if name.startswith("on")]
    assert "".join(reader.words).count(EVIL) >= 15
    assert find_path(text) is None
    assert "ann" not in re.findall(r"\bann\b", text)
    assert "…/base" in text


def test_a_failed_check_is_the_first_thing_seen() -> None:
    data = dataclasses.replace(full(), checks=(Check("bytes agree with the plan", False, "layer 3"),))
    text = render_page(data, ())
    assert 'role="alert"' in text
    assert text.index('role="alert"') < text.index("<main>")
    assert "Do not use these weights" in text


def test_numbers_stand_with_interval_and_n(page: str) -> None:
    words = " ".join("".join(Reader(page).words).split())
    assert "0.0312 [0.0293, 0.0333] nats per token (mean KLD, n = 240 chunks, 61,440 tokens)" in words
    assert "4.1" not in re.findall(r"\b4\.1\b", words)  # perplexities have no interval, so they are not shown


@pytest.mark.parametrize(
    "missing",
    [
        {"kld": (), "chosen": None},
        {"statistics": None},
        {"keep_probability": None, "bootstrap_rounds": 0},
        {"manifest": None, "checks": ()},
        {"scores": {}, "protected": {}},
        {"plan": None, "keep_probability": None, "protected": {}},
    ],
    ids=lambda value: next(iter(value)),
)
def test_parts_may_be_absent(missing: dict[str, object]) -> None:
    data = dataclasses.replace(full(), **missing)  # type: ignore[arg-type]
    reader = Reader(render_page(data, draw_all(data)))
    assert not reader.open
    assert "None" not in " ".join(reader.words)


def test_a_dense_model_with_nothing_cut() -> None:
    dense = dataclasses.replace(BASE, units=None, top_k=None, licence=None, hub_id=None)
    data = ReportData("dense", dense, dense)
    text = render_page(data, draw_all(data))
    assert "No damage has been measured" in text
    assert "What was dropped" not in text


def test_the_same_bytes_twice(page: str) -> None:
    data = full()
    assert render_page(data, draw_all(data)) == page


def test_calibrating_on_the_test_is_said() -> None:
    data = full()
    assert data.statistics is not None
    same = dataclasses.replace(data.statistics.meta, corpus_hash=data.kld[0].result.corpus_hash)
    told = render_page(dataclasses.replace(data, statistics=dataclasses.replace(data.statistics, meta=same)), ())
    assert "chosen and measured on the same corpus" in told
    assert "chosen and measured on the same corpus" not in render_page(data, ())


def test_a_choice_that_is_not_the_best_is_said() -> None:
    data = full()
    assert "is not the best candidate" not in render_page(data, ())
    worse = render_page(dataclasses.replace(data, chosen="class_max"), ())
    assert "class_max is not the best candidate of this test: class_rank, reap did less damage." in worse
