"""Read JSON from outside, field by field, trusting nothing; and turn records into JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from gemcut.errors import CheckpointError, QualityError
from gemcut.store import read_json
from gemcut.types import Json

T = TypeVar("T")
MAX_COUNT = 2**53  # larger integers lose digits in other readers of the same JSON
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


class Fields:
    """One JSON object of a record: every getter checks type and range, `done` refuses what nobody asked for.

    All getters raise CheckpointError that names the file and the path inside it (`layers.3.keep[4]`).
    """

    def __init__(self, value: object, file: Path, path: str = "") -> None:
        self.file = file
        self.path = path
        self._asked: set[str] = set()
        if not isinstance(value, dict):
            self.refuse("", value, "an object")
        self._value: dict[str, Json] = value

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path and key else (self.path or key)

    def refuse(self, key: str, got: object, wanted: str, hint: str | None = None) -> NoReturn:
        raise CheckpointError(
            f"{self.file.name} is not a record that gemcut can use",
            where=f"{self.file.name}: {self.at(key) or 'the whole file'}",
            got=_short(got),
            wanted=wanted,
            hint=hint,
        )

    def names(self) -> list[str]:
        return list(self._value)

    def has(self, key: str) -> bool:
        return key in self._value

    def raw(self, key: str) -> Json:
        self._asked.add(key)
        if key not in self._value:
            self.refuse(key, "nothing", "a value")
        return self._value[key]

    def text(self, key: str, default: str | None = None, *, empty: bool = True) -> str:
        if default is not None and key not in self._value:
            return default
        return self.check_text(key, self.raw(key), empty=empty)

    def check_text(self, key: str, value: object, *, empty: bool = True) -> str:
        if not isinstance(value, str):
            self.refuse(key, value, "a string")
        if not empty and not value:
            self.refuse(key, value, "a string that is not empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(key, ascii(value), "valid Unicode")
        return value

    def count(self, key: str, low: int = 0, high: int = MAX_COUNT) -> int:
        return self.check_count(key, self.raw(key), low, high)

    def check_count(self, key: str, value: object, low: int = 0, high: int = MAX_COUNT) -> int:
        # bool is an int in Python and must not pass as one
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, value, "an integer")
        if not low <= value <= high:
            self.refuse(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(key, value, "a number")
        if (isinstance(value, int) and abs(value) > MAX_COUNT) or not math.isfinite(value):
            self.refuse(key, value, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw(key)
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value

    def choice(self, key: str, words: Sequence[str]) -> str:
        return self.check_choice(key, self.raw(key), words)

    def check_choice(self, key: str, value: object, words: Sequence[str]) -> str:
        if not isinstance(value, str) or value not in words:
            self.refuse(key, value, " or ".join(words))
        return value

    def digest(self, key: str) -> str:
        return self.check_digest(key, self.raw(key))

    def check_digest(self, key: str, value: object) -> str:
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            self.refuse(key, value, "64 lower-case hex digits")
        return value

    def file_name(self, key: str) -> str:
        """A plain file name: no separators, no leading dot, nothing a file system could read another way."""
        value = self.raw(key)
        if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
            self.refuse(key, value, "a plain file name without separators")
        return value

    def items(self, key: str) -> list[Json]:
        value = self.raw(key)
        if not isinstance(value, list):
            self.refuse(key, value, "a list")
        return value

    def texts(self, key: str, *, distinct: bool = False) -> tuple[str, ...]:
        out = tuple(self.check_text(f"{key}[{i}]", v, empty=False) for i, v in enumerate(self.items(key)))
        if distinct:
            self._refuse_repeats(key, out)
        return out

    def counts(self, key: str, high: int = MAX_COUNT, *, distinct: bool = False) -> tuple[int, ...]:
        out = tuple(self.check_count(f"{key}[{i}]", v, 0, high) for i, v in enumerate(self.items(key)))
        if distinct:
            self._refuse_repeats(key, out)
        return out

    def _refuse_repeats(self, key: str, values: Sequence[object]) -> None:
        seen: set[object] = set()
        for i, value in enumerate(values):
            if value in seen:
                self.refuse(f"{key}[{i}]", f"{value!r} a second time", "every entry once")
            seen.add(value)

    def child(self, key: str) -> Fields:
        return Fields(self.raw(key), self.file, self.at(key))

    def children(self, key: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
        return tuple(read(Fields(v, self.file, self.at(f"{key}[{i}]"))) for i, v in enumerate(self.items(key)))

    def mapping(self, key: str) -> dict[str, Json]:
        """A free-form object whose strings are valid Unicode and whose numbers are finite."""
        if key not in self._value:
            return {}
        value = self.raw(key)
        if not isinstance(value, dict):
            self.refuse(key, value, "an object")
        self._check_free(key, value)
        return value

    def _check_free(self, key: str, value: Json) -> None:
        if isinstance(value, str):
            self.check_text(key, value)
        elif isinstance(value, float) and not math.isfinite(value):
            self.refuse(key, value, "a finite number")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                self._check_free(f"{key}[{i}]", item)
        elif isinstance(value, dict):
            for name, item in value.items():
                self.check_text(f"{key} (a key)", name)
                self._check_free(f"{key}.{name}", item)

    def free(self, key: str) -> Json:
        value = self.raw(key)
        self._check_free(key, value)
        return value

    def number_key(self, key: str, high: int) -> int:
        """A key that is a number in canonical decimal: "7", never "07" or "+7"."""
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and str(int(key)) == key and int(key) <= high):
            self.refuse(key, key, f"a number from 0 to {high} as the key")
        return int(key)

    def done(self) -> None:
        unknown = sorted(set(self._value) - self._asked)
        if unknown:
            self.refuse(unknown[0], "an unknown key", f"only {', '.join(sorted(self._asked))}")


def _short(value: object, limit: int = 80) -> str:
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def open_record(path: Path, what: str, schema: int) -> Fields:
    """The record at `path`, its schema checked before anything else is believed.

    Raises:
        UsageError: there is no such file.
        CheckpointError: not JSON, or written under another schema version.
    """
    fields = Fields(read_json(path, what), path)
    check_schema(fields, what, schema)
    return fields


def check_schema(fields: Fields, what: str, schema: int) -> None:
    """Refuse an older or a newer schema by name."""
    found = fields.count("schema")
    if found != schema:
        age = "a newer" if found > schema else "an older"
        raise CheckpointError(
            f"this {what} was written by {age} gemcut",
            where=f"{fields.file.name}: {fields.at('schema')}",
            got=f"schema {found}",
            wanted=f"schema {schema}",
            hint="update gemcut" if found > schema else "make it again with this version",
        )


def to_json(value: object) -> Json:
    """A record as JSON: dataclass fields by name, tuples as lists, mappings with string keys.

    Raises:
        QualityError: a number is not finite.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise QualityError("a record holds a number that is not finite", got=value, wanted="a finite number")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Iterable):
        return [to_json(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")
