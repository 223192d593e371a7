"""The order of stages of a recipe about heads; see `pipeline` for the run folder.

    observe → (importance) → plan → heal → cut → verify → canary → (salvage) → kld → report

Where the canary fails and the recipe allows it, the largest set of layers that passes stays cut and the others get the
base's bytes back: a second cut, verified and measured like the first.
"""

from __future__ import annotations

from pathlib import Path

from gemcut import head_stages, models, records, stages, store
from gemcut.canary import refuse_failed
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import UsageError
from gemcut.recipe import STAGES, CanaryWords, Choice, HeadWords, HealWords, Measure, Recipe
from gemcut.records.canary import load_canary
from gemcut.records.importance import load_importance
from gemcut.runs import Progress, Run, Stage, Stages
from gemcut.score.heads import head_criterion_named
from gemcut.types import Plan

STATISTICS = "statistics"
IMPORTANCE = "importance"
HEALED = "healed"
MODEL = "model"
ANSWERS = "base-answers.json"
CANARY = "canary.json"


class HeadJob:
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
        self.recipe: Recipe = recipe
        self.words: HeadWords = recipe.plan
        self.result = result
        self.force = force
        self.progress = progress
        self.stage = Stages(result, force=force)
        self.base = models.open_model(recipe.model)
        self.name = recipe.score.name
        self.planned_layers: set[int] = set()

    def until(self, name: str) -> None:
        """Every stage in order, up to the one of this name."""
        last = STAGES.index(name)
        observed = self.observe()
        if last < STAGES.index("plan"):
            return
        planned = self.plan(self.recipe.score, observed)
        plan_file = planned.folder / stages.PLAN
        plan = records.load_plan(plan_file)
        self.planned_layers = set(plan.layers)
        if last < STAGES.index("heal"):
            return
        heal = self.heal(self.recipe.heal, plan_file, planned) if self.recipe.heal is not None else None
        if last < STAGES.index("cut"):
            return
        cut = self.cut("", plan_file, heal, planned)
        self.result.chosen, self.result.model = self.name, cut.folder / MODEL
        if last < STAGES.index("verify"):
            return
        verified = self.verify("", plan_file, heal, cut)
        asked: Stage | None = None
        if last >= STAGES.index("canary") and self.recipe.canary is not None:
            asked = self.canary("", self.recipe.canary, cut)
            if not load_canary(asked.folder / CANARY).passed:
                plan_file, cut, verified, asked = self.salvage(self.recipe.canary, observed, plan_file, heal, asked)
                plan = records.load_plan(plan_file)
                self.result.model = cut.folder / MODEL
        if last >= STAGES.index("kld") and self.recipe.kld is not None:
            measured = self.measure(self.recipe.kld, cut)
            self.result.measured = stages.measured(measured.folder, [self.name])
        if last >= STAGES.index("report"):
            self.report(plan, heal, verified, asked)
        stages.kld_gate(self.recipe.kld, self.result.measured or {}, self.name)

    # ------------------------------------------------------------ one method per stage

    def observe(self) -> Stage:
        words = self.recipe.observe
        corpus = stages.read_corpus(words.corpus, self.base, words.max_tokens, words.max_tokens_per_item)
        return self.stage(
            "observe",
            "",
            stages.observe_key(self.base, corpus, words),
            (),
            lambda folder: stages.observe(
                self.base, corpus, folder / STATISTICS, words, force=self.force, progress=self.progress
            ),
        )

    def importance(self, criterion: str) -> Stage:
        words = self.recipe.observe
        corpus = stages.read_corpus(words.corpus, self.base, words.max_tokens, words.max_tokens_per_item)
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

    def plan(self, choice: Choice, observed: Stage) -> Stage:
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

    def heal(self, words: HealWords, plan_file: Path, planned: Stage) -> Stage:
        return heal_stage(
            self.stage, self.recipe, words, self.base, plan_file, planned, force=self.force, progress=self.progress
        )

    def cut(self, label: str, plan_file: Path, heal: Stage | None, parent: Stage) -> Stage:
        link = self.recipe.cut.link
        return self.stage(
            "cut",
            label,
            {"model": self.base.fingerprint, "plan": store.sha256_file(plan_file), "link": link},
            (parent.key, *((heal.key,) if heal else ())),
            lambda folder: stages.cut(
                self.base,
                plan_file,
                folder / MODEL,
                healed=healed_of(heal),
                link=link,
                force=True,
                progress=self.progress,
            ),
        )

    def verify(self, label: str, plan_file: Path, heal: Stage | None, cut: Stage) -> Stage:
        return self.stage(
            "verify",
            label,
            {"model": self.base.fingerprint},
            (cut.key,),
            lambda folder: stages.verified(
                cut.folder / MODEL, self.base, plan_file, folder, healed=healed_of(heal), progress=self.progress
            ),
        )

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
                self._answers(words),
                folder / CANARY,
                progress=self.progress,
            ),
        )

    def salvage(
        self, words: CanaryWords, observed: Stage, plan_file: Path, heal: Stage | None, asked: Stage
    ) -> tuple[Path, Stage, Stage, Stage]:
        """The largest set of layers that passes: its plan, cut, verification and canary."""
        result = load_canary(asked.folder / CANARY)
        if not result.base_sound or not words.salvage:
            refuse_failed(result, hint="the work is kept; canary.salvage: true searches the layers that may stay cut")

        def build(folder: Path) -> None:
            rest = head_stages.rescue(
                self.base,
                records.load_plan(plan_file),
                observed.folder / STATISTICS,
                healed_of(heal),
                words,
                self._answers(words),
                folder,
                progress=self.progress,
            )
            stages.save_plan(rest, folder / stages.PLAN, force=True)

        found = self.stage("salvage", "", {}, (asked.key,), build)
        rest_file = found.folder / stages.PLAN
        second = self.cut("salvaged", rest_file, heal, found)
        verified = self.verify("salvaged", rest_file, heal, second)
        again = self.canary("salvaged", words, second)
        refuse_failed(load_canary(again.folder / CANARY))
        return rest_file, second, verified, again

    def measure(self, words: Measure, cut: Stage) -> Stage:
        corpus = stages.read_corpus(words.corpus, self.base, words.max_tokens, words.max_tokens_per_item)
        settings = words.model_dump(mode="json", exclude={"corpus", "max_mean_nats"})
        return self.stage(
            "kld",
            "",
            {"model": self.base.fingerprint, "corpus": corpus.hash, **settings},
            (cut.key,),
            lambda folder: stages.kld(
                self.base, {self.name: cut.folder / MODEL}, corpus, words, folder, progress=self.progress
            ),
        )

    def report(self, plan: Plan, heal: Stage | None, verified: Stage, asked: Stage | None) -> None:
        from gemcut import head_reporting  # matplotlib takes a second that the other stages need not wait for

        assert self.result.model is not None
        dropped = max((len(one.drop) for one in plan.layers.values()), default=0)
        name = f"{self.base.name.rpartition('/')[2].partition('@')[0].replace(':', '-')}-h{plan.units - dropped}"
        self.result.report = head_reporting.write(
            self.recipe,
            self.base,
            open_checkpoint(self.result.model, name),
            plan=plan,
            restored=tuple(sorted(self.planned_layers - set(plan.layers))),
            heal=healed_of(heal),
            canary=None if asked is None else load_canary(asked.folder / CANARY),
            checks=stages.load_checks(verified.folder),
            measured=self.result.measured or {},
            times=[(s.folder.name.rsplit("-", 1)[0], s.seconds, s.peak_rss_bytes) for s in self.result.done],
            out=self.result.folder / "report",
        )

    def _answers(self, words: CanaryWords) -> Path:
        """Where the base's answers are kept; other settings are other answers, and a stale file would be refused."""
        key = store.fingerprint({"settings": head_stages.canary_settings(words).identity()})[:12]
        return self.result.folder / f"{Path(ANSWERS).stem}-{key}.json"


def heal_stage(
    stage: Stages,
    recipe: Recipe,
    words: HealWords,
    base: Checkpoint,
    plan_file: Path,
    planned: Stage,
    *,
    force: bool,
    progress: Progress | None,
) -> Stage:
    """The heal of a plan, of heads or of experts."""
    corpus = stages.read_corpus(
        words.corpus or recipe.observe.corpus, base, words.max_tokens, words.max_tokens_per_item
    )
    settings = words.model_dump(mode="json", exclude={"corpus"})
    return stage(
        "heal",
        "",
        {"model": base.fingerprint, "plan": store.sha256_file(plan_file), "corpus": corpus.hash, **settings},
        (planned.key,),
        lambda folder: head_stages.heal(
            base, records.load_plan(plan_file), corpus, words, folder / HEALED, force=force, progress=progress
        ),
    )


def healed_of(heal: Stage | None) -> Path | None:
    return None if heal is None else heal.folder / HEALED
