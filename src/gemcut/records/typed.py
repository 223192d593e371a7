"""A frozen dataclass back from JSON, every field by its declared type: what `fields.to_json` wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from gemcut.records.fields import Fields

R = TypeVar("R")


def read(cls: type[R], f: Fields, /, **given: object) -> R:
    """A record; unknown keys are refused.

        str, int (≥ 0), float (finite), bool, Literal      as they are
        X | None                                           null, or X
        another dataclass                                  an object, by this function
        tuple[X, ...]                                      a list; of a Literal: each once
        Mapping[str, X]                                    an object; of Json: any

    Args:
        given: fields that the caller has read, because more than their type decides what they may be.
    Raises:
        CheckpointError: names the file and the path inside it.
    """
    kinds = _kinds(cast(Any, cls))
    values = {name: given[name] if name in given else _value(kind, f, name) for name, kind in kinds.items()}
    f.done()
    return cls(**values)


@cache
def _kinds(cls: Any) -> dict[str, Any]:
    kinds = get_type_hints(cls)
    return {one.name: kinds[one.name] for one in dataclasses.fields(cls)}


def _value(kind: Any, f: Fields, key: str) -> object:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if f.raw(key) is None:
            return None
        (kind,) = (one for one in inner if one is not NoneType)
        return _value(kind, f, key)
    if origin is Literal:
        return f.choice(key, inner)
    if origin is tuple:
        return _list(inner[0], f, key)
    if origin is Mapping:
        if get_origin(inner[1]) is not None:  # Json
            return f.mapping(key)
        entries = f.child(key)
        return {f.check_text(f"{key} (a key)", name): _value(inner[1], entries, name) for name in entries.names()}
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return read(kind, f.child(key))
    getters: dict[Any, Callable[[str], object]] = {str: f.text, int: f.count, float: f.number, bool: f.flag}
    return getters[kind](key)


def _list(kind: Any, f: Fields, key: str) -> tuple[object, ...]:
    if get_origin(kind) is Literal:
        for i, word in enumerate(words := f.texts(key, distinct=True)):
            f.check_choice(f"{key}[{i}]", word, get_args(kind))
        return words
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return f.children(key, lambda one: read(kind, one))
    return f.texts(key) if kind is str else f.counts(key)
