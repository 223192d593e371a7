"""The order of stages of a recipe about heads; see `pipeline` for the run folder.

    observe → (importance) → plan → heal → cut → verify → canary → (salvage) → (gguf, see gguf_pipeline) → kld → report

Where the canary fails and the recipe allows it, the largest set of layers that passes stays cut and the others get the
base's bytes back: a second cut, verified and measured like the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import head_stages, records, stages
from gemcut.canary import CANARY, refuse_failed
from gemcut.errors import UsageError
from gemcut.gguf_pipeline import quantise
from gemcut.jobs import MODEL, STATISTICS, Job, heal_in, healed_of
from gemcut.nvfp4_pipeline import pack
from gemcut.recipe import STAGES, CanaryWords, HeadWords
from gemcut.records.canary import load_canary
from gemcut.records.importance import load_importance
from gemcut.runs import Progress, Run, Stage
from gemcut.score.heads import head_criterion_named
from gemcut.types import Plan

if TYPE_CHECKING:
    from gemcut.report import ReportData

IMPORTANCE = "importance"  # inside the importance stage's folder


class HeadJob(Job):
    """One run of one recipe about heads."""

    def __init__(self, result: Run, force: bool, progress: Progress | None) -> None:
        recipe = result.recipe
        assert isinstance(recipe.plan, HeadWords)
        if recipe.compare:
            raise UsageError(
                "a recipe about heads measures one criterion at a time",
                where="compare",
                hint="one recipe for each, or --set score=…",
            )
        super().__init__(result, force, progress)
        self.words: HeadWords = recipe.plan
        assert recipe.score is not None  # it goes with a plan
        self.choice = recipe.score
        self.name = recipe.score.name

    def until(self, name: str) -> None:
        """Every stage in order, up to the one of this name."""
        last = STAGES.index(name)
        observed = self.observe()
        if last < STAGES.index("plan"):
            return
        planned = self.plan(observed)
        if last < STAGES.index("heal"):
            return
        heal = self.heal(planned)
        if last < STAGES.index("cut"):
            return
        cut = self.cut("", planned, heal)
        self.result.chosen, self.result.model = self.name, cut.folder / MODEL
        if last < STAGES.index("verify"):
            return
        verified = self.verify("", planned, heal, cut)
        stays, asked = planned, None
        if last >= STAGES.index("canary") and self.recipe.canary is not None:
            asked = self.canary("", self.recipe.canary, cut)
            if not load_canary(asked.folder / CANARY).passed:
                stays = self.salvage(self.recipe.canary, observed, planned, heal, asked)
                cut = self.cut("salvaged", stays, heal)
                verified = self.verify("salvaged", stays, heal, cut)
                asked = self.canary("salvaged", self.recipe.canary, cut)
                refuse_failed(load_canary(asked.folder / CANARY))
                self.result.model = cut.folder / MODEL
        plan = plan_in(stays)
        model = self.cut_model(f"h{plan.units - max((len(one.drop) for one in plan.layers.values()), default=0)}")
        quantised = quantise(self, last, model, cut)
        packed = pack(self, last, model, cut)
        if last >= STAGES.index("kld") and self.recipe.kld is not None:
            self.measure(self.recipe.kld, {self.name: cut})
        if last >= STAGES.index("report"):
            self.report(planned, stays, heal, verified, asked, self.facts(model, quantised, packed))
        stages.kld_gate(self.recipe.kld, self.result.measured or {}, self.name)

    # ------------------------------------------------------------ one method per stage

    def importance(self, criterion: str) -> Stage:
        words = self.recipe.observe
        corpus = stages.corpus_of(words, self.base)
        return self.stage(
            "importance",
            criterion,
            {"model": self.base.fingerprint, "corpus": corpus.hash, "method": criterion, "dtype": words.dtype},
            (),
            lambda folder: head_stages.importance(
                self.base,
                corpus,
                criterion,
                folder / IMPORTANCE,
                dtype=words.dtype,
                device=words.device,
                force=True,
                progress=self.progress,
            ),
        )

    def plan(self, observed: Stage) -> Stage:
        choice = self.choice
        measured = self.importance(choice.criterion) if head_criterion_named(choice.criterion).measured else None
        parents = (observed.key, *((measured.key,) if measured else ()))

        def build(folder: Path) -> None:
            found = load_importance(measured.folder / IMPORTANCE) if measured else None
            planned = head_stages.plan_heads(
                self.base, observed.folder / STATISTICS, choice, self.words, found, progress=self.progress
            )
            records.save_scores(planned.scores, folder / stages.SCORES, force=True)
            stages.save_plan(planned.plan, folder / stages.PLAN, force=True)

        params = {"choice": choice.model_dump(mode="json"), "plan": self.words.model_dump(mode="json")}
        return self.stage("plan", choice.name, params, parents, build)

    def canary(self, label: str, words: CanaryWords, cut: Stage) -> Stage:
        return self.stage(
            "canary",
            label,
            {"model": self.base.fingerprint, **words.model_dump(mode="json", exclude={"salvage"})},
            (cut.key,),
            lambda folder: head_stages.canary(
                self.base,
                cut.folder / MODEL,
                words,
                self.answers(words),
                folder / CANARY,
                progress=self.progress,
            ),
        )

    def salvage(self, words: CanaryWords, observed: Stage, planned: Stage, heal: Stage | None, asked: Stage) -> Stage:
        """The plan of the largest set of layers that passes."""
        result = load_canary(asked.folder / CANARY)
        if not result.base_sound or not words.salvage:
            refuse_failed(result, hint="the work is kept; canary.salvage: true searches the layers that may stay cut")

        def build(folder: Path) -> None:
            rest = head_stages.rescue(
                self.base,
                plan_in(planned),
                observed.folder / STATISTICS,
                healed_of(heal),
                words,
                self.answers(words),
                folder,
                progress=self.progress,
            )
            stages.save_plan(rest, folder / stages.PLAN, force=True)

        return self.stage("salvage", "", {}, (asked.key,), build)

    def report(
        self,
        planned: Stage,
        stays: Stage,
        heal: Stage | None,
        verified: Stage,
        asked: Stage | None,
        facts: ReportData,
    ) -> None:
        from gemcut import reporting  # matplotlib takes a second that the other stages need not wait for

        plan = plan_in(stays)
        self.result.report = reporting.write_heads(
            self.recipe,
            facts,
            plan=plan,
            restored=tuple(sorted(set(plan_in(planned).layers) - set(plan.layers))),
            heal=heal_in(heal),
            canary=None if asked is None else load_canary(asked.folder / CANARY),
            checks=stages.load_checks(verified.folder),
            out=self.result.folder / "report",
        )


def plan_in(stage: Stage) -> Plan:
    """The plan that a stage left."""
    return records.load_plan(stage.folder / stages.PLAN)
