"""Every word that a recipe may say. Strict, frozen, and closed: a recipe imports no code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from gemcut.errors import UsageError
from gemcut.types import Json

SCHEMA = 1
STAGES = ("observe", "plan", "heal", "cut", "verify", "canary", "kld", "report")
_LAYERS = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]


class _Words(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_W = TypeVar("_W", bound=_Words)


class Observe(_Words):
    """The streamed pass over the calibration corpus."""

    corpus: str = Field(description="JSON lines or text; `demo:calibration` is the one that ships")
    max_tokens: int | None = Field(
        default=None, gt=0, description="whole items, class by class in turn, up to this many tokens"
    )
    max_tokens_per_item: int = Field(default=4096, gt=1, description="longer items are truncated and counted")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto is the checkpoint's own")
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1")
    max_memory_gib: float | None = Field(default=None, gt=0, description="refuse or spill to disk beyond this")
    batch_tokens: int = Field(default=4096, gt=0, description="tokens of one forward call")
    gram_tokens: int | None = Field(default=None, gt=0, description="tokens in the attention Gram matrices")


class Choice(_Words):
    """One criterion with its parameters."""

    criterion: str
    params: dict[str, JsonValue] = Field(default_factory=dict)
    label: str | None = Field(default=None, description="how tables name it; the criterion's name by default")

    @property
    def name(self) -> str:
        return self.label or self.criterion


class GuardWords(_Words):
    """What no criterion may drop."""

    super_factor: float | None = Field(
        default=50.0, gt=1, description="keep experts whose largest |output| is this many times their layer's median"
    )
    class_floor: int = Field(default=0, ge=0, description="every class keeps its own best N experts per layer")
    bootstrap: int = Field(
        default=200, ge=0, description="resamples of the questions for the keep probability; 0 is off"
    )
    seed: int = 0


class PlanWords(_Words):
    """Which experts stay."""

    kind: Literal["experts"] = "experts"
    keep: int = Field(gt=0, description="experts kept in every layer")
    guards: GuardWords = Field(default_factory=GuardWords)


class HeadWords(_Words):
    """Which query heads stay."""

    kind: Literal["heads"]
    drop: float = Field(gt=0, description="query heads dropped per layer: a share below 1, or a count")
    layers: str | None = Field(default=None, description="for example 0-3,5; all of them by default")
    mode: Literal["mask", "structural"] = Field(
        default="mask", description="write zeros, or take rows and columns out and change the config's counts"
    )

    @field_validator("layers")
    @classmethod
    def _are_ranges(cls, text: str | None) -> str | None:
        if text is not None and not _LAYERS.fullmatch(text):
            raise ValueError("layers are numbers and ranges, for example 0-3,5")
        return text


class HealWords(_Words):
    """The refit of what is left of each output projection, or of the scales of the experts that stay."""

    corpus: str | None = Field(default=None, description="what observe reads, by default")
    max_tokens: int | None = Field(default=None, gt=0)
    max_tokens_per_item: int = Field(default=4096, gt=1)
    method: Literal["sequential", "local"] = Field(
        default="sequential", description="inputs from the layers already cut and healed, or from the base"
    )
    target: Literal["stream", "branch"] = Field(
        default="stream",
        description="heads: what brings the residual stream back to the base's, or what the base's branch adds",
    )
    whole_layers: bool = Field(
        default=False, description="heads: also refit layers that lose none, behind the first that does (sequential)"
    )
    experts: Literal["scales", "down_proj"] = Field(
        default="scales", description="of a cut of experts: what is refitted of those that stay"
    )
    ridges: tuple[float, ...] = Field(
        default=(1e-3, 1e-2, 1e-1, 1.0), description="tried on held-out items, in units of the mean diagonal"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"


class CanaryWords(_Words):
    """The gate that talks to the model; see `gemcut canary`."""

    max_new_tokens: int = Field(default=48, ge=4, description="answers are cut off there")
    newly_broken: float = Field(default=0.25, ge=0, le=1, description="most answers newly broken, as a share")
    nll_ratio: float = Field(default=2.0, ge=1, description="most NLL of known-good answers, against the base")
    salvage: bool = Field(
        default=True, description="heads: search the largest set of layers that passes, restore the others"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"


class Cut(_Words):
    """The surgery."""

    link: bool = Field(default=True, description="hard-link unchanged shards instead of copying them")


class Measure(_Words):
    """KLD against the base on text that nothing was calibrated on."""

    corpus: str
    max_tokens: int | None = Field(default=None, gt=0)
    max_tokens_per_item: int = Field(default=4096, gt=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    seed: int = 0
    max_mean_nats: float | None = Field(default=None, gt=0, description="gate: a larger mean KLD ends with exit code 5")


class ReportWords(_Words):
    """The page and the card."""

    title: str | None = None


class Recipe(_Words):
    """The whole vocabulary."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: Name
    description: str = ""
    model: str = Field(description="a folder, org/name@revision, or demo:moe")
    observe: Observe
    score: Choice
    compare: tuple[Choice, ...] = Field(
        default=(), description="other criteria, cut and measured beside the chosen one"
    )
    plan: PlanWords | HeadWords = Field(discriminator="kind")
    heal: HealWords | None = Field(default=None, description="none by default; of experts, of the chosen criterion")
    cut: Cut = Field(default_factory=Cut)
    canary: CanaryWords | None = None
    kld: Measure | None = None
    report: ReportWords = Field(default_factory=ReportWords)


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
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    parts = get_args(annotation)
    if parts and all(isinstance(part, (str, int)) for part in parts):
        return " | ".join(str(part) for part in parts)
    return str(annotation).replace("typing.", "").replace("NoneType", "none")


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
        first = error.errors()[0]
        spot = _spot(first["loc"])
        wanted = sorted(Recipe.model_fields) if first["type"] == "extra_forbidden" and len(first["loc"]) == 1 else None
        raise UsageError(
            f"{spot}: {first['msg'].removeprefix('Value error, ')}",
            where=where,
            got=repr(first.get("input"))[:80],
            wanted=", ".join(wanted) if wanted else None,
            hint="gemcut show schema lists every word",
        ) from None


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
        first = error.errors()[0]
        spot = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{spot}: {first['msg'].removeprefix('Value error, ')}",
            got=repr(first.get("input"))[:80],
            hint="gemcut show schema lists every word",
        ) from None


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
        child = node.setdefault(parent, {})
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
