"""What a model's name says: organisation, base name, size, fine-tune, version, as llama.cpp's converter guesses them.

google/gemma-4-26B-A4B-it-v2   google · basename gemma-4 · size 26B-A4B · finetune it · version v2
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_TUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_NUMBER = re.compile(r"v\d+(\.\d+)*|\d.*")


@dataclass(frozen=True, slots=True)
class NameParts:
    """None where the name does not say. `name` is whole, without the organisation."""

    name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def title(name: str) -> str:
    """`gemma-4-26B-it` → `Gemma 4 26B It`: words in lower case get a capital, numbers and acronyms stay."""
    words = name.strip().replace("-", " ").split()
    return " ".join(word.title() if word.islower() and not _NUMBER.fullmatch(word) else word for word in words)


def name_parts(model_id: str, parameters: int) -> NameParts:
    """Take a name apart at its hyphens.

    Args:
        parameters: of the whole model; a size in the name that is far from it is no size but a context length.
    """
    if " " in model_id:
        return NameParts(name=model_id)
    organization, slash, name = model_id.partition("/")
    if not slash:
        organization, name = "", model_id
    parts = [_Part.of(part, i, parameters) for i, part in enumerate(p for p in name.split("-") if p)]
    if any(part.kind == "size" and any(c.isdecimal() for c in part.text) for part in parts):
        parts = [_Part(p.text, "") if p.kind == "size" and p.text.isalpha() else p for p in parts]
    head = 0  # the name begins with words and versions; versions at the very end are not part of the base name
    while head < len(parts) and (
        parts[head].kind == "version" or (not parts[head].kind and parts[head].text[0].isalpha())
    ):
        head += 1
    base = head
    while head == len(parts) and base and parts[base - 1].kind == "version":
        base -= 1
    basename = "-".join(part.text for part in parts[:base])
    sizes = dict.fromkeys(part.text for part in parts if part.kind == "size")
    tunes = [part.text for i, part in enumerate(parts) if part.kind == "tune" or (not part.kind and i >= head)]
    versions = [part.text for part in parts[base:] if part.kind == "version"]
    sure = bool(sizes or tunes or versions)
    return NameParts(
        name=name or None,
        organization=None if organization.startswith(".") else organization or None,
        basename=(basename or None) if sure else None,
        finetune="-".join(tunes) or None,
        version="-".join(versions) or None,
        size_label="-".join(sizes) or None,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """kind: version, type, size, tune, or "" for a plain word."""

    text: str
    kind: str

    @classmethod
    def of(cls, text: str, place: int, parameters: int) -> _Part:
        if _VERSION.fullmatch(text):
            return cls(text, "version")
        if _TYPE.fullmatch(text):
            return cls(text.upper(), "type")
        if place and _SIZE.fullmatch(text):
            return cls._size(text.replace("_", "."), parameters)
        return cls(text, "tune" if place and _TUNE.fullmatch(text) else "")

    @classmethod
    def _size(cls, text: str, parameters: int) -> _Part:
        if text[-1].isdecimal():  # 7b1 is 7.1b
            text = f"{text[:-2]}.{text[-1]}{text[-2]}"
        if len(text) > 1 and text[-2].isdecimal():
            text = text[:-1] + text[-1].upper()
        try:
            said = float(text[:-1]) * 1000.0 ** " KMBT".find(text[-1])
        except ValueError:  # A4B, small
            return cls(text, "size")
        if parameters and abs(said - parameters) > 7 * parameters // 8:
            return cls(text[:-1] + text[-1].lower(), "tune")
        return cls(text, "size")
