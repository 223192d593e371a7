"""The words of a recipe, stage by stage. Strict, frozen, and closed; `recipe` puts them together."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from gemcut.errors import UsageError
from gemcut.nvfp4.choices import (
    MAX_BORROWED,
    ActivationRule,
    KvCache,
    Layout,
    Method,
    Narrow,
    Scheme,
    Targets,
    wants_statistics,
)

_LAYERS = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size_bytes(text: str) -> int:
    """Bytes of `10GiB`, `500MB`, `2G` (thousands without the i) or a plain number.

    Raises:
        ValueError: it is none of these, or below one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{text!r} is not a size; write 10GiB, 500MB or a number of bytes")
    return int(float(match[1]) * unit)


def _is_size(text: str) -> str:
    size_bytes(text)
    return text


def _is_file_type(text: str) -> str:
    from gemcut.export.mix.stock import file_type  # the tables of every type

    try:
        file_type(text)
    except UsageError as error:
        raise ValueError(f"{error.what}; {error.hint}") from None
    return text


FileType = Annotated[str, AfterValidator(_is_file_type)]
Size = Annotated[str, AfterValidator(_is_size)]
# YAML has no tuples: lists are accepted where a word holds several, everything else stays strict.
Names = Annotated[tuple[str, ...], Field(strict=False)]


def choices_of(annotation: object) -> list[str]:
    """What a word that is one of several may be, in order."""
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    return [one for part in get_args(annotation) for one in choices_of(part)]


class Words(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Observe(Words):
    """The streamed pass over the calibration corpus."""

    corpus: str = Field(description="JSON lines or text; `demo:calibration` is the one that ships")
    max_tokens: int | None = Field(
        default=None, gt=0, description="whole items, class by class in turn, up to this many tokens"
    )
    max_items: int | None = Field(default=None, gt=0, description="at most so many items, in the same turns")
    chat_only: bool = Field(default=False, description="items with messages alone, not plain text")
    max_tokens_per_item: int = Field(default=4096, gt=1, description="longer items are truncated and counted")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto is the checkpoint's own")
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1")
    max_memory_gib: float | None = Field(default=None, gt=0, description="refuse or spill to disk beyond this")
    batch_tokens: int = Field(default=4096, gt=0, description="tokens of one forward call")
    gram_tokens: int | None = Field(default=None, gt=0, description="tokens in the attention Gram matrices")


class Choice(Words):
    """One criterion with its parameters."""

    criterion: str
    params: dict[str, JsonValue] = Field(default_factory=dict)
    label: str | None = Field(default=None, description="how tables name it; the criterion's name by default")

    @property
    def name(self) -> str:
        return self.label or self.criterion


class GuardWords(Words):
    """What no criterion may drop."""

    super_factor: float | None = Field(
        default=50.0, gt=1, description="keep experts whose largest |output| is this many times their layer's median"
    )
    class_floor: int = Field(default=0, ge=0, description="every class keeps its own best N experts per layer")
    bootstrap: int = Field(
        default=200, ge=0, description="resamples of the questions for the keep probability; 0 is off"
    )
    seed: int = 0


class PlanWords(Words):
    """Which experts stay."""

    kind: Literal["experts"] = "experts"
    keep: int = Field(gt=0, description="experts kept in every layer")
    guards: GuardWords = Field(default_factory=GuardWords)


class HeadWords(Words):
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


class HealWords(Words):
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


class CanaryWords(Words):
    """The gate that talks to the model; see `gemcut canary`."""

    max_new_tokens: int = Field(default=48, ge=4, description="answers are cut off there")
    newly_broken: float = Field(default=0.25, ge=0, le=1, description="most answers newly broken, as a share")
    nll_ratio: float = Field(default=2.0, ge=1, description="most NLL of known-good answers, against the base")
    salvage: bool = Field(
        default=True, description="heads: search the largest set of layers that passes, restore the others"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"


class Cut(Words):
    """The surgery."""

    link: bool = Field(default=True, description="hard-link unchanged shards instead of copying them")


class Measure(Words):
    """KLD against the base on text that nothing was calibrated on."""

    corpus: str
    max_tokens: int | None = Field(default=None, gt=0)
    max_tokens_per_item: int = Field(default=4096, gt=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    seed: int = 0
    max_mean_nats: float | None = Field(
        default=None, gt=0, description="gate of the cut, or of every file where nothing is cut: exit code 5 beyond it"
    )
    floor: bool = Field(
        default=False, description="gguf: also the base in BF16, written and deleted: what other arithmetic does"
    )


class ImatrixWords(Words):
    """The importance matrix, from the statistics of the model that is quantised."""

    variant: Literal["plain", "hybrid", "rms4", "max", "auto"] = Field(
        default="plain", description="auto: per tensor, what rounds best on held-out items"
    )
    target: FileType | None = Field(default=None, description="auto: the file type that it is judged by, as IQ2_M")
    roundings: int | None = Field(
        default=None, ge=1, le=256, description="each block is picked of so many quantisations; 8 for auto, else 1"
    )
    prior: int = Field(default=64, ge=0, description="rows that a starved expert borrows from its layer's mean")
    gate: bool = Field(default=True, description="text that starves too many experts ends the run with exit code 5")

    @model_validator(mode="after")
    def _auto_has_a_target(self) -> ImatrixWords:
        if (self.variant == "auto") != bool(self.target):
            raise ValueError("variant auto and target go together")
        return self


class CurvatureWords(Words):
    """What a change of each weight does to the answers: sizes are solved by it."""

    corpus: str | None = Field(default=None, description="what observe reads, by default")
    max_tokens: int | None = Field(default=30_000, gt=0)
    max_tokens_per_item: int = Field(default=4096, gt=1)
    draws: int = Field(default=1, ge=1, description="answers drawn for each token")
    seed: int = Field(default=0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    device: str = "cpu"


class FitWords(Words):
    """A file for a card."""

    memory: Size = Field(description="all of the card's memory, as 24GiB")
    context: int = Field(default=8192, gt=0, description="tokens of the KV cache")
    kv: str = Field(default="f16", description="type of the KV cache, as q8_0")
    beside: Names = Field(default=(), description="what lies in the memory too: mmproj, drafter, or a GGUF file")


class DrafterWords(Words):
    """The drafter's own files."""

    model: str = Field(description="a folder, org/name@revision, or demo:moe-drafter")
    tiers: Names = ("Q8_0",)


class GgufWords(Words):
    """GGUF files of the cut model, or of the model itself where nothing is cut."""

    tiers: Names = Field(default=(), description="file types and ContribDynamic tiers: Q4_K_M, IQ2_M, CD-Q3_K_M, …")
    sizes: Annotated[tuple[Size, ...], Field(strict=False)] = Field(
        default=(), description="files of at most this, as 10GiB: the best types for it"
    )
    fit: Annotated[tuple[FitWords, ...], Field(strict=False)] = Field(default=(), description="files for cards")
    overrides: Names = Field(default=(), description="REGEX=TYPE, over each of them")
    imatrix: ImatrixWords | None = Field(default_factory=ImatrixWords, description="null for none")
    curvature: CurvatureWords = Field(default_factory=CurvatureWords, description="used by sizes and fit")
    mmproj: Annotated[tuple[Literal["F32", "F16", "BF16", "Q8_0"], ...], Field(strict=False)] = Field(
        default=(), description="types of the vision tower's files"
    )
    drafter: DrafterWords | None = None
    pad_experts: bool = Field(
        default=False, description="experts as wide as blocks of 256, by zeros; pays below 3.5 bits a weight"
    )
    max_shard_size: Size | None = Field(default=None, description="split files into parts of at most this")
    threads: int | None = Field(default=None, gt=0, description="that quantise; one for each core by default")

    @model_validator(mode="after")
    def _asks_for_something(self) -> GgufWords:
        if not (self.tiers or self.sizes or self.fit or self.mmproj or self.drafter):
            raise ValueError("no file is asked for: tiers, sizes, fit, mmproj or drafter")
        return self

    @property
    def solves(self) -> bool:
        """Whether some file's types are solved for."""
        return bool(self.sizes or self.fit)


class Nvfp4Words(Words):
    """An NVFP4 checkpoint of the cut model, or of the model itself where nothing is cut."""

    scheme: Scheme = Field(default="NVFP4A16", description="four-bit weights; NVFP4 has four-bit activations too")
    targets: Targets = Field(default="mlp+experts", description="what is quantised; all takes attention as well")
    scales: Method | None = Field(
        default=None, description="rule of block scales; weighted where there are statistics, else sweep"
    )
    activations: ActivationRule = Field(default="max", description="rule of the activations' scale, for NVFP4")
    max_borrowed: float = Field(
        default=MAX_BORROWED,
        ge=0,
        le=1,
        description="share of a layer's experts that may take their peers' activation scale; more is exit code 5",
    )
    kv: KvCache = Field(
        default="none", description="scales of an FP8 cache: 1, what nothing overflows, or what was seen"
    )
    layout: Layout = Field(default="compressed-tensors", description="names of the tensors on disk")
    ignore: Names = Field(default=(), description="modules that stay, as regular expressions: 'layers.0.mlp'")
    narrow: Narrow = Field(
        default="keep",
        description="matrices whose width is no multiple of 16 stay as they are, or are an error",
    )
    device: str = Field(default="cpu", description="where blocks are rounded: cpu, cuda, cuda:1")
    threads: int | None = Field(
        default=None, gt=0, description="threads that quantise; one for each free core by default"
    )
    drafter: str | None = Field(default=None, description="a model that the serving line drafts with")

    @property
    def observes(self) -> bool:
        """Whether statistics are wanted; a recipe has some to offer, so that the best scales are weighted."""
        return wants_statistics(self.scheme, self.scales, self.kv)


class ReportWords(Words):
    """The page and the card."""

    title: str | None = None
