"""What a report is made of: the pipeline fills one `ReportData`, and everything shown is read from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import CheckpointError, UsageError
from gemcut.types import F64, Kind, KldResult, KldRow, Manifest, Plan, Scores, Statistics

if TYPE_CHECKING:
    from gemcut.report.nvfp4 import Nvfp4
    from gemcut.report.quants import Quants

ALL = "all"  # the KldRow that pools the classes


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the headers of one checkpoint say. `name` is shown to people and is never a local path.

    units: experts (or query heads) per layer that has the site; None where nothing was cut.
    components: bytes per component, in the order they are to be drawn; sums to `size_bytes`.
    hub_id, licence, pipeline_tag: as the base repository states them, or None when it does not.
    """

    name: str
    architecture: str
    dtype: str
    parameters: int
    size_bytes: int
    components: Mapping[str, int]
    layers: int
    fingerprint: str
    units: int | None = None
    top_k: int | None = None
    active_parameters: int | None = None
    hub_id: str | None = None
    licence: str | None = None
    pipeline_tag: str | None = None
    auto_class: str = "AutoModelForCausalLM"


@dataclass(frozen=True, slots=True)
class KldEntry:
    """One candidate's measured damage: a criterion, a heal, or the base against itself."""

    label: str
    result: KldResult
    note: str = ""

    @property
    def is_noise_floor(self) -> bool:
        """True where the base was compared with itself."""
        return self.result.base_fingerprint == self.result.candidate_fingerprint

    def row(self, cls: str = ALL) -> KldRow | None:
        """The row of one class, or None when that class was not measured."""
        return next((row for row in self.result.rows if row.cls == cls), None)


@dataclass(frozen=True, slots=True)
class CriterionNote:
    """How a criterion is computed and where it comes from."""

    name: str
    formula: str
    source: str


@dataclass(frozen=True, slots=True)
class Check:
    """One question that `verify` asked of the written bytes, and the answer."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table as text. `align` has one letter per column: l or r. `chosen` is the row to highlight, or None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    chosen: int | None = None


@dataclass(frozen=True, slots=True)
class Extra:
    """A table that belongs to one kind of cut only: a heal, a canary, a search."""

    title: str
    text: str  # one or two sentences below the title
    table: Table


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of one run: a record of what happened, not a benchmark."""

    name: str
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure: its file stem, the one sentence under it, and the SVG."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """All that the page, the card and the tables show. Every part but the first three may be absent.

    keep_probability: float64 [L, U], share of bootstrap rounds over questions in which the unit was kept; rows are
        the plan's layers in ascending order.
    protected: reason → bool [L, U]: units that a guard (super experts, class floors) keeps whatever their score.
    scores: criterion → Scores; the plan's own criterion gives the rank order of the cut figure.
    quants: GGUF files of the candidate; without a plan the report is about them alone.
    nvfp4: the NVFP4 checkpoint made of the candidate; without plan and quants it is the candidate itself.
    kld: every measured candidate; `chosen` is the label of the one this report is about.

    Raises:
        UsageError: labels repeat, `chosen` names none of them, or the candidates were not measured under one protocol.
        CheckpointError: an array does not have the plan's shape, or a probability lies outside [0, 1].
    """

    title: str
    base: ModelFacts
    candidate: ModelFacts
    plan: Plan | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)
    statistics: Statistics | None = None
    keep_probability: F64 | None = None
    bootstrap_rounds: int = 0
    protected: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    kld: tuple[KldEntry, ...] = ()
    chosen: str | None = None
    manifest: Manifest | None = None
    checks: tuple[Check, ...] = ()
    stages: tuple[StageTime, ...] = ()
    recipe: str = ""
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    criteria: tuple[CriterionNote, ...] = ()
    calibration_corpus: str = ""
    evaluation_corpus: str = ""
    quants: Quants | None = None
    nvfp4: Nvfp4 | None = None
    extras: tuple[Extra, ...] = ()
    notes: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_kld()
        self._check_arrays()

    def _check_kld(self) -> None:
        labels = [entry.label for entry in self.kld]
        if len(set(labels)) != len(labels):
            raise UsageError("two measured candidates have the same label", got=", ".join(labels))
        if self.chosen is not None and self.chosen not in labels:
            raise UsageError("the chosen candidate was not measured", got=self.chosen, wanted=" | ".join(labels))
        for name in ("base_fingerprint", "corpus_hash", "template_hash", "dtype"):
            seen = {str(getattr(entry.result, name)) for entry in self.kld}
            if len(seen) > 1:
                raise UsageError(
                    f"the candidates differ in {name}: one table cannot hold them",
                    got=", ".join(sorted(value[:12] for value in seen)),
                    hint="measure all of them against one base, on one corpus, template and dtype",
                )

    def _check_arrays(self) -> None:
        arrays: dict[str, NDArray[np.bool_] | F64] = dict(self.protected)
        if self.keep_probability is not None:
            arrays["keep probabilities"] = self.keep_probability
            if not bool(np.all((self.keep_probability >= 0) & (self.keep_probability <= 1))):
                raise CheckpointError("a keep probability lies outside [0, 1]")
        for name, array in arrays.items():
            wanted = (len(self.layers), self.plan.units) if self.plan else None
            if array.shape != wanted:
                raise CheckpointError(f"{name}: the shape is not the plan's", got=array.shape, wanted=wanted)

    @property
    def only_quants(self) -> bool:
        """Nothing was cut: the report is about GGUF files of the base."""
        return self.plan is None and self.quants is not None

    @property
    def only_nvfp4(self) -> bool:
        """Nothing was cut, and no GGUF file was made: the candidate is the NVFP4 checkpoint."""
        return self.plan is None and self.quants is None and self.nvfp4 is not None

    @property
    def kind(self) -> Kind:
        """What was cut: experts unless the plan says heads."""
        return self.plan.kind if self.plan else "experts"

    @property
    def layers(self) -> tuple[int, ...]:
        """The plan's layers in ascending order: the rows of every [L, U] array here."""
        return tuple(sorted(self.plan.layers)) if self.plan else ()

    @property
    def entry(self) -> KldEntry | None:
        """The measured candidate that this report is about."""
        if self.chosen is None:
            real = [entry for entry in self.kld if not entry.is_noise_floor]
            return real[0] if len(real) == 1 else None
        return next(entry for entry in self.kld if entry.label == self.chosen)

    @property
    def noise_floor(self) -> KldEntry | None:
        """The base against itself, when it was measured."""
        return next((entry for entry in self.kld if entry.is_noise_floor), None)

    @property
    def plan_scores(self) -> Scores | None:
        """The scores of the plan's own criterion, when they cover the plan's layers and units."""
        scores = self.scores.get(self.plan.criterion) if self.plan else None
        if scores is None or self.plan is None:
            return None
        fits = scores.layers == self.layers and scores.units == self.plan.units
        return scores if fits else None
