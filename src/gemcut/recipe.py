"""Every word that a recipe may say, put together, and how one is read. A recipe imports no code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, JsonValue, ValidationError, model_validator

from gemcut.errors import UsageError
from gemcut.types import Json
from gemcut.vocabulary import (
    CanaryWords,
    Choice,
    CurvatureWords,
    Cut,
    GgufWords,
    GuardWords,
    HeadWords,
    HealWords,
    ImatrixWords,
    Measure,
    Nvfp4Words,
    Observe,
    PlanWords,
    ReportWords,
    Words,
)

__all__ = [
    "SCHEMA",
    "STAGES",
    "CanaryWords",
    "Choice",
    "CurvatureWords",
    "Cut",
    "GgufWords",
    "GuardWords",
    "HeadWords",
    "HealWords",
    "ImatrixWords",
    "Measure",
    "Nvfp4Words",
    "Observe",
    "PlanWords",
    "Recipe",
    "ReportWords",
    "build",
    "curvature_words",
    "gguf_words",
    "head_words",
    "heal_words",
    "layers_of",
    "load",
    "measure_words",
    "nvfp4_words",
    "observe_words",
    "params",
    "parse",
    "plan_words",
    "resolved",
    "shipped",
    "source",
    "words",
]

SCHEMA = 1
STAGES = (
    "observe", "plan", "heal", "cut", "verify", "canary", "imatrix", "curvature", "gguf", "nvfp4", "kld", "report",
)  # fmt: skip
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
_W = TypeVar("_W", bound=Words)


class Recipe(Words):
    """The whole vocabulary."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: Name
    description: str = ""
    model: str = Field(description="a folder, org/name@revision, or demo:moe")
    observe: Observe
    score: Choice | None = Field(default=None, description="needed by a plan")
    compare: tuple[Choice, ...] = Field(
        default=(), description="other criteria, cut and measured beside the chosen one"
    )
    plan: Annotated[PlanWords | HeadWords, Field(discriminator="kind")] | None = Field(
        default=None, description="nothing is cut without one"
    )
    heal: HealWords | None = Field(default=None, description="none by default; of experts, of the chosen criterion")
    cut: Cut = Field(default_factory=Cut)
    canary: CanaryWords | None = None
    gguf: GgufWords | None = Field(default=None, description="none by default; of the chosen criterion's cut")
    nvfp4: Nvfp4Words | None = Field(default=None, description="none by default; of the chosen criterion's cut")
    kld: Measure | None = None
    report: ReportWords = Field(default_factory=ReportWords)

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        if (self.plan is None) != (self.score is None):
            raise ValueError("plan and score go together")
        if self.plan is None:
            if self.gguf is None and self.nvfp4 is None:
                raise ValueError("nothing to do: plan cuts, gguf and nvfp4 quantise")
            if alone := [name for name in ("compare", "heal") if getattr(self, name)]:
                raise ValueError(f"{alone[0]} belongs to a plan")
            if self.canary is not None and self.nvfp4 is None:
                raise ValueError("canary belongs to a plan or to nvfp4")
        return self


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(ref: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe from a file or by the name of a shipped one, with `a.b=v` overrides applied before validation.

    Raises:
        UsageError: no such recipe, not YAML, or a word or value that the vocabulary does not have.
    """
    path = Path(ref)
    if not path.is_file():
        names = shipped()
        if ref not in names:
            raise UsageError(
                "there is no such recipe",
                got=ref,
                wanted="a YAML file or one of: " + ", ".join(names),
                hint="gemcut list recipes",
            )
        path = names[ref]
    return parse(_text(path), path.name, overrides)


def source(ref: str) -> str:
    """The recipe's text as written; see `load` for what `ref` may be."""
    path = Path(ref)
    return _text(path if path.is_file() else shipped()[ref])


def words() -> list[tuple[str, str, str, str]]:
    """Every word: path, type, default, meaning. What `gemcut show schema` and docs/recipes.md print."""
    return list(_words("", Recipe))


def _words(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    for name, info in model.model_fields.items():
        path = prefix + (info.alias or name)
        inner = list(_models(info.annotation))
        repeated = "[]" if "tuple" in str(info.annotation) else ""
        default = (
            "required"
            if info.is_required()
            else ("" if inner else json.dumps(info.get_default(call_default_factory=True)))
        )
        yield path + repeated, "" if inner else _type(info.annotation), default, info.description or ""
        for sub in inner:
            yield from _words(path + repeated + ".", sub)


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _type(annotation: object) -> str:
    """A type as a reader of recipes knows it."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _type(parts[0])
    if kind is tuple:
        return f"list of {_type(parts[0])}"
    if kind is Literal:
        return " | ".join(map(str, parts))
    if kind in (Union, UnionType):
        return " | ".join(map(_type, parts))
    if isinstance(annotation, type):
        return "none" if annotation is type(None) else annotation.__name__
    return str(annotation).replace("typing.", "")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the recipe is not UTF-8", where=path.name, got=f"a bad byte at {error.start}") from None


def parse(text: str, where: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe from YAML text; see `load`."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe is not YAML: {str(error).splitlines()[0]}", where=where) from None
    if not isinstance(data, dict):
        raise UsageError("the recipe is not a mapping", where=where, got=type(data).__name__, wanted="name:, model:, …")
    for override in overrides:
        _set(data, override)
    return build(data, where)


def build(data: dict[str, Json], where: str = "recipe") -> Recipe:
    """Validate a mapping; the first wrong word is named by its path."""
    try:
        # YAML has no tuples: lists are accepted where the model says tuple, everything else stays strict.
        return Recipe.model_validate(_tuples(data))
    except ValidationError as error:
        raise _wrong(error, "recipe", where, sorted(Recipe.model_fields)) from None


def _wrong(error: ValidationError, whole: str, where: str, known: Sequence[str] = ()) -> UsageError:
    """The first wrong word, named by its path; what is wrong with the whole has no value to show."""
    first = error.errors()[0]
    alone = first["type"] == "extra_forbidden" and len(first["loc"]) == 1
    return UsageError(
        f"{_spot(first['loc']) or whole}: {first['msg'].removeprefix('Value error, ')}",
        where=where or None,
        got=repr(first.get("input"))[:80] if first["loc"] else None,
        wanted=", ".join(known) if alone and known else None,
        hint="gemcut show schema lists every word",
    )


def _spot(path: tuple[int | str, ...]) -> str:
    """Where a wrong word stands, as the recipe spells it: the kind of plan is no level of its own."""
    parts = [part for i, part in enumerate(path) if not (path[0] == "plan" and i == 1 and part in ("experts", "heads"))]
    return ".".join(map(str, parts))


def params(pairs: tuple[str, ...]) -> dict[str, JsonValue]:
    """`name=value` pairs of --param; values are YAML."""
    out: dict[str, Json] = {}
    for pair in pairs:
        _set(out, pair)
    return out


def observe_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> Observe:
    """The observe part of a recipe, from the flags of a verb."""
    return _part(Observe, said, sets)


def measure_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> Measure:
    """The kld part of a recipe, from the flags of a verb."""
    return _part(Measure, said, sets)


def head_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> HeadWords:
    """The plan part of a recipe about heads, from the flags of a verb."""
    return _part(HeadWords, {"kind": "heads", **said}, sets)


def heal_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> HealWords:
    """The heal part of a recipe, from the flags of a verb."""
    return _part(HealWords, said, sets)


def gguf_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> GgufWords:
    """The gguf part of a recipe, from the flags of a verb."""
    return _part(GgufWords, said, sets)


def nvfp4_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> Nvfp4Words:
    """The nvfp4 part of a recipe, from the flags of a verb."""
    return _part(Nvfp4Words, said, sets)


def curvature_words(said: dict[str, Json], sets: tuple[str, ...] = ()) -> CurvatureWords:
    """The curvature of the gguf part, from the flags of a verb."""
    return _part(CurvatureWords, said, sets)


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """Layer numbers of "0-3,5", ascending; None for all.

    Raises:
        UsageError: a range that runs backwards.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise UsageError("a range of layers runs backwards", got=part, wanted=f"{last}-{first}")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def plan_words(keep: int, sets: tuple[str, ...] = ()) -> PlanWords:
    """The plan part of a recipe, from the flags of a verb."""
    return _part(PlanWords, {"keep": keep}, sets)


def _part(model: type[_W], said: dict[str, Json], sets: tuple[str, ...]) -> _W:
    data: dict[str, Json] = {key: value for key, value in said.items() if value is not None}
    for override in sets:
        _set(data, override)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _wrong(error, model.__name__.removesuffix("Words").lower(), "") from None


def _tuples(data: dict[str, Json]) -> dict[str, object]:
    out: dict[str, object] = dict(data)
    compare = out.get("compare")
    if isinstance(compare, list):
        out["compare"] = tuple({"criterion": c} if isinstance(c, str) else c for c in compare)
    plan = out.get("plan")
    if isinstance(plan, dict):
        out["plan"] = {"kind": "experts", **plan}
    heal = out.get("heal")
    if isinstance(heal, dict) and isinstance(heal.get("ridges"), list):
        out["heal"] = {**heal, "ridges": tuple(heal["ridges"])}
    if isinstance(out.get("score"), str):
        out["score"] = {"criterion": out["score"]}
    return out


def _set(data: dict[str, Json], override: str) -> None:
    key, sign, raw = override.partition("=")
    if not sign or not key:
        raise UsageError("--set wants path=value", got=override, wanted="plan.keep=98")
    value = yaml.safe_load(raw)
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:  # null is a part that is not there
            child = node[parent] = {}
        if isinstance(child, str) and parent == "score":
            child = node[parent] = {"criterion": child}
        if not isinstance(child, dict):
            raise UsageError("--set path goes through a value", where=key, got=parent)
        node = child
    node[last] = value


def resolved(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, default_flow_style=False
    )
