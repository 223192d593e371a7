"""Signs of a model that no longer talks, read from one answer: its token ids and its text. Pure, no torch.

Every sign has its base's answer as yardstick: a small model repeats itself now and then, and a finding counts against a
candidate only where its base does not show it at the same prompt (see `judge`).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Collection, Sequence

from gemcut.canary.settings import Limits
from gemcut.records.canary import Answer, Finding, Signs, Style
from gemcut.stream.rendering import CHANNEL_CLOSE, CHANNEL_OPEN

# First words of Unicode names that say how a letter is drawn, not which script it belongs to.
_DRAWN = {
    "ANGSTROM", "BLACK-LETTER", "CIRCLED", "COMBINING", "DOUBLE-STRUCK", "EULER", "FEMININE", "FULLWIDTH", "HALFWIDTH",
    "KELVIN", "MASCULINE", "MATHEMATICAL", "MICRO", "MODIFIER", "OHM", "PLANCK", "SCRIPT", "SUBSCRIPT", "SUPERSCRIPT",
}  # fmt: skip
_ONE_SCRIPT = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA"}
_HAN = "CJK"
_BROKEN = "BROKEN BYTES"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CUT_BYTES = 3  # a character of four bytes can be cut off after three


def loop_period(ids: Sequence[int], *, repeats: int = 3, tokens: int = 12) -> int:
    """Smallest period in which the answer ends, 0 where it does not loop.

        min{p : t(p) ≥ max(repeats·p, tokens)},   t(p) = p + max{m : ids[−i] = ids[−i−p] for i = 1 … m}

    Args:
        ids: token ids [T] without the ending one. O(T²/repeats).
        repeats, tokens: the tail must hold the period so often, and be so long.
    """
    n = len(ids)
    for period in range(1, n // repeats + 1):
        same = 0
        while same + period < n and ids[n - 1 - same] == ids[n - 1 - same - period]:
            same += 1
        if same + period >= max(repeats * period, tokens):
            return period
    return 0


def distinct(ids: Sequence[int], n: int = 4) -> float:
    """Distinct n-grams by all n-grams of the ids [T]; 1 where there are fewer than n tokens (Li et al., 2016)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def zlib_ratio(text: str) -> float:
    """Bytes of UTF-8 by bytes of raw deflate at level 9; 1 for an empty text."""
    raw = text.encode()
    if not raw:
        return 1.0
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(raw) / len(deflate.compress(raw) + deflate.flush())


def script_of(letter: str) -> str | None:
    """The script of one character: first word of its Unicode name, kana as one; None for what belongs to none.

    A replacement character is a script of its own: bytes that are no text.
    """
    if letter == _REPLACEMENT:
        return _BROKEN
    if not unicodedata.category(letter).startswith("L"):
        return None
    word = unicodedata.name(letter, "").partition(" ")[0]
    return None if not word or word in _DRAWN else _ONE_SCRIPT.get(word, word)


def scripts(text: str) -> set[str]:
    """Scripts of a text; Japanese kana bring Chinese characters with them."""
    found = {script for letter in set(text) if (script := script_of(letter)) is not None}
    return found | {_HAN} if "KANA" in found else found


def foreign_letters(text: str, allowed: Collection[str]) -> tuple[int, float]:
    """Letters in other scripts than `allowed`: their number, and their share of all letters (0 of 0 is 0).

    Replacement characters at the very end do not count: the length limit cut a character of several bytes there.
    """
    body = text.rstrip()
    tail = len(body) - len(body.rstrip(_REPLACEMENT))
    if tail <= _CUT_BYTES:
        body = body[: len(body) - tail]
    found = [script for letter in body if (script := script_of(letter)) is not None]
    foreign = sum(script not in allowed for script in found)
    return foreign, foreign / len(found) if found else 0.0


def visible(text: str, style: Style) -> str:
    """What a user would see: a chat answer without the thinking block that it may begin with.

    A block that is not closed is all there is, and nothing of it would be shown. Raw text has no blocks.
    """
    if style == "raw" or not text.lstrip().startswith(CHANNEL_OPEN):
        return text
    return text.partition(CHANNEL_CLOSE)[2]


def leaks(text: str, style: Style, markers: Sequence[str]) -> tuple[str, ...]:
    """Special tokens, spelled by whatever tokens, in the visible text: each once, sorted."""
    shown = visible(text, style)
    return tuple(sorted({marker for marker in {*markers, CHANNEL_OPEN, CHANNEL_CLOSE} if marker in shown}))


def unmarked(text: str, markers: Sequence[str]) -> str:
    """The text without special tokens."""
    names = sorted({*markers, CHANNEL_OPEN, CHANNEL_CLOSE}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), "", text)


def signs(
    answer: Answer,
    style: Style,
    prompt: str,
    markers: Sequence[str],
    limits: Limits,
    *,
    yardstick: Answer,
) -> Signs:
    """Every detector on one answer.

    Args:
        prompt: its text: a script that is asked in may be answered in.
        markers: special tokens of the tokenizer, as they are spelled.
        yardstick: the base's answer, for the base itself its own: its scripts are allowed, and an answer that never
            ends counts as endless only where the base's ended within half of the length.
    """
    ids = answer.ids[:-1] if answer.ended else answer.ids
    words = unmarked(answer.text, markers)
    allowed = scripts(prompt) | scripts(unmarked(yardstick.text, markers))
    number, share = foreign_letters(words, allowed)
    period = loop_period(ids, repeats=limits.loop_repeats, tokens=limits.loop_tokens)
    four, ratio, found = distinct(ids), zlib_ratio(words), leaks(answer.text, style, markers)
    # an answer that was cut off while it thought is not an empty one
    empty = not words.strip() or (answer.ended and not unmarked(visible(answer.text, style), markers).strip())
    findings: list[Finding] = []
    long = len(ids) >= limits.loop_tokens
    packed = ratio > limits.zlib_ratio and len(words.encode()) >= limits.zlib_bytes
    if period or packed or (long and four < limits.distinct4):
        findings.append("repetition")
    if number > limits.foreign_letters and share > limits.foreign_share:
        findings.append("script")
    if found:
        findings.append("marker")
    if empty:
        findings.append("empty")
    if not answer.ended and yardstick.ended and 2 * len(yardstick.ids) <= len(answer.ids):
        findings.append("endless")
    return Signs(
        tokens=len(answer.ids),
        loop_period=period,
        distinct4=four,
        zlib_ratio=ratio,
        foreign_letters=number,
        foreign_share=share,
        markers=found,
        ended=answer.ended,
        empty=empty,
        findings=tuple(findings),
    )


def divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, or the length of the one that ends before; None where they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))
