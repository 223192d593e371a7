"""Detectors: a planted fault of any size is found, and text without one is left alone."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.canary import Limits
from gemcut.canary.detect import (
    distinct,
    divergence,
    foreign_letters,
    leaks,
    loop_period,
    script_of,
    scripts,
    signs,
    visible,
    zlib_ratio,
)
from gemcut.records.canary import Answer, Finding, Style

MARKERS = ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<pad>")
LIMITS = Limits()


def answer(text: str, ids: list[int] | None = None, *, ended: bool = False) -> Answer:
    made = list(range(len(text.split()))) if ids is None else ids
    return Answer("p", tuple([*made, 1] if ended else made), text, ended, 1.0, None)


def findings(
    text: str,
    *,
    ids: list[int] | None = None,
    ended: bool = True,
    style: Style = "chat",
    prompt: str = "Why does it rain?",
    base: Answer | None = None,
) -> tuple[Finding, ...]:
    one = answer(text, ids, ended=ended)
    sound = base or answer("Because the air holds water", ended=True)
    return signs(one, style, prompt, MARKERS, LIMITS, yardstick=sound).findings


@given(
    period=st.lists(st.integers(0, 4095), min_size=1, max_size=40, unique=True),
    before=st.lists(st.integers(5000, 9000), max_size=60),
    repeats=st.integers(3, 9),
    cut=st.integers(0, 39),
)
def test_a_planted_loop_of_any_period_is_found(period: list[int], before: list[int], repeats: int, cut: int) -> None:
    ids = before + period * repeats + period[: cut % len(period)]
    looped = len(ids) - len(before)
    found = loop_period(ids, repeats=3, tokens=12)
    assert found == (len(period) if looped >= 12 else 0)


@given(ids=st.lists(st.integers(0, 4095), min_size=1, max_size=120, unique=True))
def test_tokens_that_never_come_back_are_no_loop(ids: list[int]) -> None:
    assert loop_period(ids) == 0
    assert distinct(ids) == 1.0


@given(seed=st.integers(0, 2**32), length=st.integers(1, 200))
def test_random_text_is_not_flagged(seed: int, length: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(4096) for _ in range(length)]
    words = " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(length))
    assert findings(words, ids=ids) == ()


def test_a_loop_counts_only_at_the_end() -> None:
    assert loop_period([7] * 20) == 1
    assert loop_period([7] * 20 + [8]) == 0
    assert loop_period([1, 2] * 5) == 0  # ten tokens: too short to tell
    assert loop_period([1, 2] * 6) == 2


def test_repetition_is_seen_by_any_of_three_signs() -> None:
    assert findings("x", ids=[3] * 30) == ("repetition",)
    phrase = list(range(12))
    scattered = [*phrase, 90, *phrase, 91, *phrase, 92, *phrase, 93]  # no strict loop
    assert loop_period(scattered) == 0
    assert findings("x", ids=scattered) == ("repetition",)
    assert findings("the same " * 40, ids=list(range(48))) == ("repetition",)
    assert findings("Rain falls because warm air rises, cools and can no longer hold all of its water.") == ()


def test_zlib_ratio_orders_texts() -> None:
    assert zlib_ratio("") == 1.0
    prose = "Rain falls because warm air rises, cools and can no longer hold all of its water."
    assert 1.0 < zlib_ratio(prose) < 2.0
    assert zlib_ratio("ha " * 50) > 10


@pytest.mark.parametrize(
    ("letter", "script"),
    [
        ("a", "LATIN"), ("ß", "LATIN"), ("я", "CYRILLIC"), ("額", "CJK"), ("の", "KANA"), ("ア", "KANA"),
        ("ー", "KANA"), ("ق", "ARABIC"), ("ह", "DEVANAGARI"), ("1", None), (" ", None), ("µ", None), ("ℎ", None),
        ("\x00", None), ("\ufffd", "BROKEN BYTES"),
    ],
)  # fmt: skip
def test_scripts(letter: str, script: str | None) -> None:
    assert script_of(letter) == script


def test_kana_bring_chinese_characters() -> None:
    assert scripts("の") == {"KANA", "CJK"}
    assert scripts("額") == {"CJK"}


def test_foreign_letters_are_those_of_neither_prompt_nor_base() -> None:
    assert foreign_letters("abc 額額", {"LATIN"}) == (2, 0.4)
    assert foreign_letters("123 !?", {"LATIN"}) == (0, 0.0)
    assert findings("額額額 is") == ("script",)
    assert findings("額額額 is", prompt="額?") == ()
    assert findings("額額額 is", base=answer("額", ended=True)) == ()
    assert findings("a long answer in which one α, one β are letters of formulas") == ()


def test_a_character_cut_off_by_the_limit_is_not_broken_text() -> None:
    assert foreign_letters("rain\ufffd", {"LATIN"}) == (0, 0.0)
    assert foreign_letters("r\ufffd\ufffd\ufffdain", {"LATIN"})[0] == 3
    assert foreign_letters("rain" + "\ufffd" * 9, {"LATIN"})[0] == 9


@pytest.mark.parametrize(
    ("text", "style", "found"),
    [
        ("It rains.", "chat", ()),
        ("It rains.<|turn>", "chat", ("<|turn>",)),
        ("It rains.<|turn>", "raw", ("<|turn>",)),
        ("<|channel>thought\nhm<channel|>It rains.", "thinking", ()),
        ("<|channel>thought\nhm<channel|>It rains.", "chat", ()),
        ("<|channel>thought\nhm<channel|>It rains.", "raw", ("<channel|>", "<|channel>")),
        ("<|channel>thought\nhm<channel|>It<channel|> rains.", "thinking", ("<channel|>",)),
        ("<|channel>thought\nnot yet", "thinking", ()),
        ("It rains.<channel|>", "thinking", ("<channel|>",)),
        ("Use <b> for bold.", "chat", ()),
    ],
)
def test_marker_leaks(text: str, style: Style, found: tuple[str, ...]) -> None:
    assert leaks(text, style, MARKERS) == found


def test_visible_text_starts_behind_the_thoughts() -> None:
    assert visible("<|channel>thought\nhm<channel|>Yes.", "thinking") == "Yes."
    assert visible("<|channel>thought\nhm", "thinking") == ""
    assert visible("a <|channel> b", "chat") == "a <|channel> b"


def test_empty_answers() -> None:
    assert findings("") == ("empty",)
    assert findings(" \n\n") == ("empty",)
    assert findings("<|channel>thought\nhm<channel|>", style="thinking") == ("empty",)
    assert findings("<|channel>thought\nhm", style="thinking", ended=False) == ()  # still thinking at the limit
    assert findings("<|channel>thought\nhm", style="thinking", ended=True) == ("empty",)


def test_endless_needs_a_base_that_ended_long_before() -> None:
    long = " ".join(f"word{i}" for i in range(40))
    assert findings(long, ended=False) == ("endless",)
    assert findings(long, ended=True) == ()
    late = answer(" ".join(f"word{i}" for i in range(30)), ended=True)
    assert findings(long, ended=False, base=late) == ()
    never = answer(long, ended=False)
    assert findings(long, ended=False, base=never) == ()


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_divergence_is_the_first_difference(a: list[int], b: list[int]) -> None:
    at = divergence(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at]
        assert a[at : at + 1] != b[at : at + 1]
    assert divergence(b, a) == at
