"""Recipe → stages → run folder. The only file that knows the order.

    runs/NAME/
      recipe.yaml  resolved.yaml             as written · every default filled in
      observe-KEY/  plan-LABEL-KEY/  cut-LABEL-KEY/model/  verify-LABEL-KEY/  kld-KEY/
      imatrix-KEY/  curvature-KEY/  gguf-KEY/files/  kld-gguf-KEY/   see `gguf_pipeline`
      nvfp4-KEY/model/  verify-nvfp4-KEY/  kld-nvfp4-KEY/            see `nvfp4_pipeline`
      report/{index.html, README.md, *.svg}  the page and the card
    Every stage folder has a stage.json, written last: key, parameters, parents, seconds, peak memory, stack.

KEY is a hash of the stage's name, its declared version, its parameters and its parents' keys, so a changed recipe
redoes what depends on the change and nothing else. A stage without stage.json is not finished and is done again
(`observe` goes on from its last whole layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import plan_stages, stages, store
from gemcut.comparing import FLOOR
from gemcut.errors import UsageError
from gemcut.gguf_pipeline import quantise, wants_imatrix
from gemcut.head_pipeline import HeadJob
from gemcut.jobs import MODEL, STATISTICS, Job, heal_in
from gemcut.nvfp4_pipeline import pack
from gemcut.recipe import STAGES, Choice, PlanWords, Recipe, resolved
from gemcut.runs import Progress, Run, Stage, lock

if TYPE_CHECKING:
    from gemcut.report import ReportData


def run(
    recipe: Recipe,
    runs: Path,
    *,
    source: str = "",
    until: str = "report",
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run a recipe, or go on with it: finished stages are found and kept.

    Args:
        runs: folder of run folders.
        source: the recipe as written, kept beside the resolved one.
        until: last stage to do, one of STAGES.
        force: redo every stage.
    Raises:
        UsageError: an unknown stage, or another run in the same folder.
        QualityError: the KLD gate of the recipe; all work is kept.
    """
    if until not in STAGES:
        raise UsageError("there is no such stage", got=until, wanted=", ".join(STAGES))
    result = Run(recipe, runs / recipe.name)
    with lock(result.folder):
        store.write_bytes(result.folder / "recipe.yaml", (source or resolved(recipe)).encode())
        store.write_bytes(result.folder / "resolved.yaml", resolved(recipe).encode())
        _job_of(recipe)(result, force, progress).until(until)
    return result


def _job_of(recipe: Recipe) -> type[HeadJob | ExpertJob | UncutJob]:
    if recipe.plan is None:
        return UncutJob
    return HeadJob if recipe.plan.kind == "heads" else ExpertJob


class ExpertJob(Job):
    """One run of one recipe about experts."""

    def __init__(self, result: Run, force: bool, progress: Progress | None) -> None:
        assert isinstance(result.recipe.plan, PlanWords)
        if result.recipe.canary is not None and result.recipe.nvfp4 is None:
            raise UsageError(
                "the canary stage belongs to recipes about heads, or to nvfp4", where="canary", hint="gemcut canary"
            )
        super().__init__(result, force, progress)
        self.words: PlanWords = result.recipe.plan
        assert self.recipe.score is not None  # it goes with a plan
        self.choices = _choices(self.recipe.score, self.recipe.compare)
        self.chosen = self.choices[0].name

    def until(self, name: str) -> None:
        """Every stage in order, up to the one of this name. The heal is of the chosen criterion's cut alone."""
        last = STAGES.index(name)
        observed = self.observe()
        if last < STAGES.index("plan"):
            return
        plans = {choice.name: self.plan(choice, observed) for choice in self.choices}
        if last < STAGES.index("heal"):
            return
        heal = self.heal(plans[self.chosen])
        if last < STAGES.index("cut"):
            return
        cuts = {name: self.cut(name, planned, heal if name == self.chosen else None) for name, planned in plans.items()}
        self.result.chosen = self.chosen
        self.result.model = cuts[self.chosen].folder / MODEL
        if last < STAGES.index("verify"):
            return
        verified = self.verify(self.chosen, plans[self.chosen], heal, cuts[self.chosen])
        cut = self.cut_model(f"{self.words.keep}e")
        quantised = quantise(self, last, cut, cuts[self.chosen])
        packed = pack(self, last, cut, cuts[self.chosen])
        if last >= STAGES.index("kld") and self.recipe.kld is not None:
            self.measure(self.recipe.kld, cuts)
        if last >= STAGES.index("report"):
            self.report(observed, plans, heal, verified, self.facts(cut, quantised, packed))
        stages.kld_gate(self.recipe.kld, self.result.measured or {}, self.chosen)

    def plan(self, choice: Choice, observed: Stage) -> Stage:
        words = self.words
        return self.stage(
            "plan",
            choice.name,
            {"choice": choice.model_dump(mode="json"), "plan": words.model_dump(mode="json")},
            (observed.key,),
            lambda folder: plan_stages.plan(observed.folder / STATISTICS, choice, words, folder, force=True),
        )

    def report(
        self,
        observed: Stage,
        plans: Mapping[str, Stage],
        heal: Stage | None,
        verified: Stage,
        facts: ReportData,
    ) -> None:
        from gemcut import reporting  # matplotlib takes a second that the other stages need not wait for

        self.result.report = reporting.write_experts(
            self.recipe,
            self.words,
            facts,
            statistics=observed.folder / STATISTICS,
            planned={label: plan_stages.load_planned(planned.folder) for label, planned in plans.items()},
            checks=stages.load_checks(verified.folder),
            heal=heal_in(heal),
            out=self.result.folder / "report",
        )


class UncutJob(Job):
    """One run of a recipe that cuts nothing: the model's GGUF files, its NVFP4 checkpoint, or both."""

    def until(self, name: str) -> None:
        """Every stage in order, up to the one of this name."""
        last = STAGES.index(name)
        if last < STAGES.index("nvfp4") and wants_statistics(self.recipe):
            self.observe()
        quantised = quantise(self, last, self.base)
        packed = pack(self, last, self.base)
        if last >= STAGES.index("report") and (quantised is not None or packed is not None):
            from gemcut import reporting  # matplotlib takes a second that the other stages need not wait for

            self.result.report = reporting.write_uncut(
                self.recipe, self.base, quantised, packed, times=self.times(), out=self.result.folder / "report"
            )
        measured = {} if quantised is None else {k: v for k, v in quantised.measured.items() if k != FLOOR}
        if packed is not None and packed.measured is not None:
            measured[packed.name] = packed.measured
        for candidate in measured:
            stages.kld_gate(self.recipe.kld, measured, candidate, hint="larger types, or other importances or scales")


def wants_statistics(recipe: Recipe) -> bool:
    """Whether something of a recipe without a cut stands on an observation."""
    files, folder = recipe.gguf, recipe.nvfp4
    return (files is not None and wants_imatrix(files)) or (folder is not None and folder.observes)


def _choices(chosen: Choice, others: tuple[Choice, ...]) -> list[Choice]:
    """The chosen criterion first, then the ones it is compared with; labels must differ."""
    choices = [chosen, *others]
    names = [choice.name for choice in choices]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            "two criteria of the recipe have the same name", got=", ".join(sorted(twice)), hint="give one a label"
        )
    return choices
