"""The frozen types that flow between the rooms. No disk, no torch.

Axes, used in every shape comment and docstring of the project:

    C classes      L layers (those with the site)   E experts     Q questions (corpus items)
    T tokens       H hidden                         I expert width
    U units of a site (experts or query heads)      D head dim    S calibration splits (2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import QualityError

F64: TypeAlias = NDArray[np.float64]
F32: TypeAlias = NDArray[np.float32]
I64: TypeAlias = NDArray[np.int64]
Kind: TypeAlias = Literal["experts", "heads"]
ImportanceMethod: TypeAlias = Literal["loo", "taylor"]
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# Bytes per element of every safetensors dtype that gemcut passes through.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


# ---------------------------------------------------------------- checkpoint


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies: never its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int  # absolute byte offset in the shard file
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    @property
    def elements(self) -> int:
        n = 1
        for dim in self.shape:
            n *= dim
        return n


@dataclass(frozen=True, slots=True)
class Slice:
    """One tensor of a site: `axis` holds the units, `block` consecutive rows per unit.

    Invariant: `shape[axis] == units * block`, checked when a site is opened.
    """

    name: str
    axis: int
    block: int


@dataclass(frozen=True, slots=True)
class Site:
    """A place that can be cut. Made only by a family."""

    layer: int
    kind: Kind
    units: int
    slices: tuple[Slice, ...]


# ---------------------------------------------------------------- edits: a closed set; the default is keep


@dataclass(frozen=True, slots=True)
class Take:
    """Keep these positions of an axis, in this order (strictly increasing)."""

    axis: int
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Omit:
    """Leave the tensor out."""


@dataclass(frozen=True, slots=True)
class Rename:
    """Same bytes under another name."""

    to: str


@dataclass(frozen=True, slots=True)
class Mask:
    """Write zeros at these positions of an axis; the shape stays."""

    axis: int
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """The bytes of a stored tensor of equal shape and dtype, streamed from its file; `then` is taken from them."""

    path: Path
    ref: TensorRef  # its offsets are those in `path`; its name may differ
    then: Take | None = None


Edit: TypeAlias = Take | Omit | Rename | Mask | Replace
Edits: TypeAlias = Mapping[str, Edit]


# ---------------------------------------------------------------- statistics

# Per class sums over routed tokens, float64 [C, L, E]. f = expert output (unweighted), g = final top-k weight.
EXPERT_SUMS = ("n", "g", "f", "f2", "gf", "gf2", "gf_rel", "easy")
#   n       tokens routed to the expert
#   g       Σ g                 f      Σ ‖f‖             f2    Σ ‖f‖²
#   gf      Σ g·‖f‖             gf2    Σ (g·‖f‖)²        gf_rel Σ g·‖f‖ / ‖y‖, y = the experts' summed output
#   easy    Σ (1 − cos(r, r + y))·g·‖f‖, r = the residual that enters the MoE branch (EASY-EP's token weight)
# The same per question, float32 [Q, L, E]: what coverage and the bootstrap need.
QUESTION_SUMS = ("n", "g", "f", "f2", "gf", "easy")
# Largest |component of f|, float64 [C, L, E]: not a sum; merges by maximum.
EXPERT_MAXIMA = ("f_max",)


@dataclass(frozen=True, slots=True)
class Question:
    """One corpus item as it was observed."""

    id: str
    cls: str
    tokens: int
    weight: float


@dataclass(frozen=True, slots=True)
class StatisticsMeta:
    """What the sums were made of. Two Statistics merge only if everything but corpus and questions agrees."""

    schema: int
    model_fingerprint: str
    model_name: str
    family: str
    corpus_hash: str
    template_hash: str
    bos_policy: str
    max_tokens_per_item: int
    truncated_items: int
    dtype: str
    classes: tuple[str, ...]
    questions: tuple[Question, ...]
    layers: tuple[int, ...]  # layers that have experts, ascending; () for a dense model
    experts: int
    top_k: int
    stack: Mapping[str, str]  # package versions

    @property
    def tokens(self) -> int:
        return sum(q.tokens for q in self.questions)


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """The expert sums of one observed checkpoint; linears and Grams stay on disk until asked for.

    `by_class[name]` float64 [C, L, E] for EXPERT_SUMS and EXPERT_MAXIMA.
    `by_question[name]` float32 [Q, L, E] for QUESTION_SUMS.
    """

    meta: StatisticsMeta
    fingerprint: str
    by_class: Mapping[str, F64]
    by_question: Mapping[str, F32]


# ---------------------------------------------------------------- scores and plans


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """`values` float64 [L, U]; higher is always kept first. Non-finite values raise at construction.

    `protected` bool [L, U]: units that the criterion itself never drops (floors), with the reason in `why`.
    `per_class` float64 [C, L, U] when the criterion looks at classes: what `--explain` shows.
    """

    criterion: str
    params: Mapping[str, Json]
    kind: Kind
    layers: tuple[int, ...]
    values: F64
    model_fingerprint: str
    statistics_fingerprint: str
    corpus_hash: str
    protected: NDArray[np.bool_] | None = None
    why: str = ""
    classes: tuple[str, ...] = ()
    per_class: F64 | None = None

    def __post_init__(self) -> None:
        bad = np.argwhere(~np.isfinite(self.values))
        if len(bad):
            row, unit = (int(v) for v in bad[0])
            raise QualityError(
                f"score {self.criterion!r} is not finite for {len(bad)} units",
                where=f"layer {self.layers[row]}, unit {unit}",
                got=float(self.values[row, unit]),
                wanted="a finite number",
                hint="observe again: a non-finite statistic must never be ranked",
            )

    @property
    def units(self) -> int:
        return int(self.values.shape[1])


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer of a plan: kept units ascending, and a reason for every dropped one."""

    keep: tuple[int, ...]
    drop: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Intent. Which units stay, and why the others go. Hand-editable on disk (`plan.json`)."""

    kind: Kind
    model_fingerprint: str
    units: int
    layers: Mapping[int, LayerPlan]
    criterion: str = "hand"
    params: Mapping[str, Json] = field(default_factory=dict)
    corpus_hash: str = ""
    statistics_fingerprint: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class HeadImportance:
    """What the loss says about query heads. Higher: missed more. Shapes that disagree or non-finite values raise.

    method: "loo", the rise of the loss without the head (may be negative); "taylor", |∂ loss / ∂ head's factor|.
    values, stderr: float64 [L, U], nats per predicted token; stderr over items, None for a single item.
    per_class: float64 [C, L, U], classes in the order of `classes`.   tokens: predicted tokens.
    """

    method: ImportanceMethod
    layers: tuple[int, ...]
    values: F64
    stderr: F64 | None
    classes: tuple[str, ...]
    per_class: F64
    model_fingerprint: str
    corpus_hash: str
    template_hash: str
    dtype: str
    tokens: int
    items: int

    def __post_init__(self) -> None:
        shape = (len(self.layers), self.values.shape[-1])
        for name, array, wanted in (
            ("values", self.values, shape),
            ("stderr", self.stderr, shape),
            ("per_class", self.per_class, (len(self.classes), *shape)),
        ):
            if array is None:
                continue
            if array.shape != wanted:
                raise QualityError(f"{name} of head importance has another shape", got=array.shape, wanted=wanted)
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                row, head = (int(v) for v in bad[0][-2:])
                raise QualityError(
                    f"head importance {self.method!r} is not finite",
                    where=f"{name}, layer {self.layers[row]}, head {head}",
                    wanted="a finite number",
                )

    @property
    def units(self) -> int:
        return int(self.values.shape[1])


# ---------------------------------------------------------------- manifest: facts from the written bytes

Found: TypeAlias = Literal["same", "take", "mask", "values", "reshaped", "added", "removed"]


@dataclass(frozen=True, slots=True)
class TensorFact:
    """What happened to one tensor, found by comparing bytes.

    relative_change: ‖after − before‖ / ‖before‖ where shapes agree; None where they do not.
    index: the positions of `axis` that were kept (take) or zeroed (mask).
    blake3_before, blake3_after: BLAKE3 of the tensor's bytes in hex; files are recorded with sha256.
    """

    name: str
    found: Found
    dtype: str
    shape_before: tuple[int, ...] | None
    shape_after: tuple[int, ...] | None
    blake3_before: str | None
    blake3_after: str | None
    axis: int | None = None
    index: tuple[int, ...] | None = None
    relative_change: float | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Facts about a checkpoint against its base, computed from written bytes, never from a plan."""

    schema: int
    base_fingerprint: str
    fingerprint: str
    tensors: tuple[TensorFact, ...]
    config_changes: Mapping[str, tuple[Json, Json]]  # dotted key → (before, after)
    files: Mapping[str, str]  # every file of the folder → sha256, our own records excepted
    size_bytes_before: int
    size_bytes_after: int


# ---------------------------------------------------------------- measures


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that never travels without n and its interval (95 % unless said)."""

    value: float
    low: float
    high: float
    n: int  # independent units that were resampled (chunks or questions), not tokens


@dataclass(frozen=True, slots=True)
class KldRow:
    """KL(base ‖ candidate) in nats over the tokens of one class, or of all classes (`cls == "all"`)."""

    cls: str
    tokens: int
    mean: Estimate
    median: Estimate
    p99: Estimate
    same_top: Estimate  # share of positions where both models' most likely token agrees
    ln_ppl_ratio: Estimate  # ln PPL(candidate) − ln PPL(base)
    ppl_base: float
    ppl_candidate: float


@dataclass(frozen=True, slots=True)
class KldResult:
    """One candidate against one base on one corpus."""

    base_fingerprint: str
    candidate_fingerprint: str
    candidate: str  # name shown to people; never a local path
    corpus_hash: str
    template_hash: str
    dtype: str
    chunks: int
    seed: int
    rows: tuple[KldRow, ...]
