"""Text from outside stays text, and names of folders do not leave the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.report.text import Markdown, code_block, code_span, escape_markdown, find_path, plain, redact


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("base: /home/ann/models/gemma", "base: …/gemma"),
        ("base: /home/ann", "base: …"),
        ("/Users/ann/x.yaml", "…/x.yaml"),
        ("in ~/models/gemma now", "in …/gemma now"),
        ("~ann/secret/plan.json", "…/plan.json"),
        (r"C:\Users\ann\gemma", "…/gemma"),
        (r"C:\Users\ann", "…"),
        ("file:///mnt/disk/base", "…/base"),
        ("'/data/runs/a', 2", "'…/a', 2"),
        ("/root", "…"),
    ],
)
def test_local_paths_are_redacted(text: str, wanted: str) -> None:
    assert redact(text) == wanted
    assert find_path(text) is not None
    assert find_path(redact(text)) is None


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/a/b/c",
        "org/name@main",
        "tokens/s and 3/4",
        "./runs/a and recipes/demo.yaml",
        "layers 1 / 2 / 3",
        "</td></tr></table>",
        'src="data:image/png;base64,iVBOR/a/b/c+\n/home/w/x=="',
    ],
)
def test_what_is_no_local_path_stays(text: str) -> None:
    assert find_path(text) is None


def test_controls_and_direction_overrides_become_visible() -> None:
    assert plain("a\x00b\u202ec\x1b[31m") == "a\ufffdb\ufffdc\ufffd[31m"
    assert plain("line\n\ttab") == "line\n\ttab"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("a | b", r"a \| b"),
        ("# title", r"\# title"),
        ("1. item", r"1\. item"),
        ("- item", r"\- item"),
        ("---", r"\---"),
        ("[click](javascript:x)", r"\[click\](javascript:x)"),
        ("two\nlines", "two lines"),
        ("class_rank", "class_rank"),
        ("+0.031 [+0.028, +0.034]", "+0.031 [+0.028, +0.034]"),
        ("−1.5 %", "−1.5 %"),
    ],
)
def test_markdown_is_escaped_where_it_would_act_and_nowhere_else(text: str, wanted: str) -> None:
    assert escape_markdown(text) == wanted


def test_markdown_of_ours_passes() -> None:
    assert escape_markdown(Markdown("**bold**")) == "**bold**"


@given(st.text(max_size=40))
def test_code_cannot_be_closed_from_inside(text: str) -> None:
    span = code_span(text)
    ticks = len(span) - len(span.lstrip("`"))
    assert "`" * ticks not in span[ticks:-ticks]
    assert "\n" not in span
    block = code_block(text).split("\n")
    assert block[-1] == block[0]
    assert not any(line.strip().startswith(block[0]) for line in block[1:-1])
