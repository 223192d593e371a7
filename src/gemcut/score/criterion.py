"""What a criterion is: a name, its parameters with their bounds, and a function from sums to a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import QualityError, UsageError
from gemcut.score.sums import Sums
from gemcut.types import F64, Json, Scores


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """What a criterion says.

    values: float64 [L, E], higher is kept first.
    protected: bool [L, E], units the criterion never drops, with the reason in `why`.
    per_class: float64 [C, L, E], each class's own view, for criteria that look at classes.
    """

    values: F64
    protected: NDArray[np.bool_] | None = None
    why: str = ""
    per_class: F64 | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    default: str
    options: tuple[str, ...]

    def check(self, name: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.options:
            raise UsageError(f"{name} has no such choice", got=repr(value), wanted=", ".join(self.options))
        return value


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer within bounds."""

    default: int
    low: int
    high: int = 2**31 - 1

    def check(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise UsageError(
                f"{name} is out of bounds", got=repr(value), wanted=f"an integer from {self.low} to {self.high}"
            )
        return value


@dataclass(frozen=True, slots=True)
class Real:
    """A finite number within bounds."""

    default: float
    low: float
    high: float

    def check(self, name: str, value: object) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high
        if not good:
            raise UsageError(
                f"{name} is out of bounds", got=repr(value), wanted=f"a number from {self.low:g} to {self.high:g}"
            )
        assert isinstance(value, (int, float))
        return float(value)


@dataclass(frozen=True, slots=True)
class ClassWeights:
    """A weight of 0 or more per class; classes that are not named weigh 1."""

    default: Mapping[str, float] = field(default_factory=dict)

    def check(self, name: str, value: object) -> dict[str, float]:
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} is not a mapping", got=repr(value), wanted="class: weight")
        out: dict[str, float] = {}
        for cls, weight in value.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not isinstance(cls, str) or not number or not math.isfinite(weight) or weight < 0:
                raise UsageError(f"{name}.{cls} is not a weight", got=repr(weight), wanted="a number of 0 or more")
            out[cls] = float(weight)
        return out


Param: TypeAlias = Choice | Whole | Real | ClassWeights
Checked: TypeAlias = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A way to rank experts. `rank` may assume that its parameters were checked.

    from_questions: False when resampling questions would say nothing about the ranking.
    """

    name: str
    about: str
    source: str
    rank: Callable[[Sums, Checked], Ranking]
    params: Mapping[str, Param] = field(default_factory=dict)
    from_questions: bool = True

    def check(self, given: Mapping[str, object]) -> dict[str, Json]:
        """All parameters, defaults filled in.

        Raises:
            UsageError: an unknown parameter, or a value out of its bounds.
        """
        return check_params(self.name, self.params, given)


def check_params(criterion: str, params: Mapping[str, Param], given: Mapping[str, object]) -> dict[str, Json]:
    """Every parameter of a criterion, defaults filled in.

    Raises:
        UsageError: an unknown parameter, or a value out of its bounds.
    """
    unknown = sorted(set(given) - set(params))
    if unknown:
        raise UsageError(
            f"criterion {criterion!r} has no parameter {unknown[0]!r}",
            wanted=", ".join(params) or "no parameter at all",
        )
    out: dict[str, Json] = {}
    for name, param in params.items():
        value: object = given.get(name, param.default)
        checked = param.check(f"{criterion}.{name}", value)
        out[name] = dict(checked) if isinstance(checked, dict) else checked
    return out


def refuse_flat(scores: Scores) -> None:
    """Equal scores would be ranked by index, which looks like a result.

    Raises:
        QualityError: a layer whose scores are all equal.
    """
    flat = np.flatnonzero(scores.values.max(axis=1) == scores.values.min(axis=1))
    if len(flat):
        row = int(flat[0])
        raise QualityError(
            f"{scores.criterion!r} has nothing to rank in {len(flat)} layers",
            where=f"layer {scores.layers[row]}",
            got=f"all {scores.units} scores are {scores.values[row, 0]:g}",
            wanted="scores that differ",
            hint="observe more text, or choose another criterion",
        )


def text(params: Checked, name: str) -> str:
    """A checked parameter that is a word."""
    value = params[name]
    assert isinstance(value, str)
    return value


def whole(params: Checked, name: str) -> int:
    """A checked parameter that is an integer."""
    value = params[name]
    assert isinstance(value, int)
    return value


def real(params: Checked, name: str) -> float:
    """A checked parameter that is a number."""
    value = params[name]
    assert isinstance(value, (int, float))
    return float(value)


def class_weights(params: Checked, name: str) -> Mapping[str, float]:
    """A checked parameter that maps classes to weights."""
    value = params[name]
    assert isinstance(value, dict)
    return {cls: float(weight) for cls, weight in value.items() if isinstance(weight, (int, float))}
