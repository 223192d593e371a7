"""Text from models, recipes and corpora, made safe to publish: no control characters, no local paths, no markup."""

from __future__ import annotations

import re

# A path that names this machine: two components from the root, a known root, a home, a drive or a file URL.
_PATH = re.compile(
    r"""(?x)
    file://[^\s"'<>|]*
    | \b[A-Za-z]:\\[^\s"'<>|]+
    | (?<![\w.:/<\-~])~[\w.\-]*/[^\s"'<>|,;)\]]*
    | (?<![\w.:/<\-~])/(?:[\w.@+\-]+/)+[^\s"'<>|,;)\]]*
    | (?<![\w.:/<\-~])/(?:home|root|tmp|mnt|media|Users|Volumes)\b
    """
)
_DATA_URL = re.compile(r"base64,[A-Za-z0-9+/=\s]+")  # base64 has slashes
_HOMES = ("home", "Users")  # what follows them is a user name
# C0 and C1 controls but tab and newline; bidirectional overrides; what XML forbids.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MARKDOWN = re.compile(r"([\\`*<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_LINK = re.compile(r"\][(\[:]")


def redact(text: str) -> str:
    """Replace each local path by `…/` and its last component: names of folders tell who and where."""

    def last(match: re.Match[str]) -> str:
        parts = [part for part in re.split(r"[/\\]+", match.group(0)) if part]
        names_user = len(parts) < 2 or parts[-2] in _HOMES
        return "…" if names_user or parts[-1].startswith("~") else f"…/{parts[-1]}"

    return _PATH.sub(last, text)


def find_path(text: str) -> str | None:
    """The first local path in a text that is about to be written, or None."""
    match = _PATH.search(_DATA_URL.sub("", text))
    return match.group(0) if match else None


def plain(text: str) -> str:
    """Text that XML, HTML and a terminal can hold: controls and bidi overrides become `�`, local paths are redacted."""
    return redact(_CONTROL.sub("\ufffd", text.replace("\r\n", "\n")))


class Markdown(str):
    """Text that is Markdown already: the card's template puts everything else through `escape_markdown`."""

    __slots__ = ()


def escape_markdown(value: object) -> Markdown:
    """One line of text as Markdown that renders as itself: never as markup, HTML, a table cell border or a heading."""
    if isinstance(value, Markdown):
        return value
    line = " ".join(plain(str(value)).split())
    escaped = _MARKDOWN.sub(r"\\\1", line)
    if _LINK.search(escaped):  # brackets alone are harmless, and intervals are written in them
        escaped = escaped.replace("[", "\\[").replace("]", "\\]")
    return Markdown(re.sub(r"^(\d*)([-+=#.)]+)(?=\s|$)", r"\1\\\2", escaped))  # lists, headings, rules


def code_span(value: object) -> Markdown:
    """A code span that its content cannot close; a `|` is escaped, as tables demand."""
    line = " ".join(plain(str(value)).split()).replace("|", "\\|")
    ticks = "`" * (longest_run(line, "`") + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return Markdown(f"{ticks}{pad}{line}{pad}{ticks}")


def code_block(value: object, language: str = "") -> Markdown:
    """A fenced block that its content cannot close."""
    text = plain(str(value)).rstrip("\n")
    fence = "`" * max(3, longest_run(text, "`") + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def longest_run(text: str, char: str) -> int:
    """Length of the longest run of one character."""
    return max((len(run) for run in re.findall(re.escape(char) + "+", text)), default=0)
