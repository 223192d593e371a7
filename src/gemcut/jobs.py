"""What every run of a recipe does, of experts or of heads: observe, heal, cut, verify, measure; see `pipeline`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import head_stages, models, records, stages, store
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.recipe import CanaryWords, Measure
from gemcut.records.heal import HEAL_FILE, HealReport, load_heal
from gemcut.runs import Progress, Run, Stage, Stages

if TYPE_CHECKING:
    from gemcut.gguf_stages import Quantised
    from gemcut.nvfp4_stages import Packed
    from gemcut.report import ReportData

STATISTICS = "statistics"  # inside the observe stage's folder
HEALED = "healed"  # inside the heal stage's
MODEL = "model"  # inside a cut stage's


class Job:
    """One run of one recipe: each method is one stage and returns what the next ones stand on."""

    def __init__(self, result: Run, force: bool, progress: Progress | None) -> None:
        self.recipe = result.recipe
        self.result = result
        self.force = force
        self.progress = progress
        self.stage = Stages(result, force=force)
        self.base = models.open_model(self.recipe.model)

    def observe(self, model: Checkpoint | None = None, label: str = "", parents: tuple[str, ...] = ()) -> Stage:
        """The streamed pass over the recipe's model, or over another one that was made of it."""
        words = self.recipe.observe
        observed = model or self.base
        corpus = stages.corpus_of(words, observed)
        return self.stage(
            "observe",
            label,
            stages.observe_key(observed, corpus, words),
            parents,
            lambda folder: stages.observe(
                observed, corpus, folder / STATISTICS, words, force=self.force, progress=self.progress
            ),
        )

    def heal(self, planned: Stage) -> Stage | None:
        """The refit after a plan, where the recipe wants one."""
        words = self.recipe.heal
        if words is None:
            return None
        plan_file = planned.folder / stages.PLAN
        corpus = stages.corpus_of(words, self.base, self.recipe.observe.corpus)
        settings = words.model_dump(mode="json", exclude={"corpus"})
        return self.stage(
            "heal",
            "",
            {"model": self.base.fingerprint, "plan": store.sha256_file(plan_file), "corpus": corpus.hash, **settings},
            (planned.key,),
            lambda folder: head_stages.heal(
                self.base,
                records.load_plan(plan_file),
                corpus,
                words,
                folder / HEALED,
                force=self.force,
                progress=self.progress,
            ),
        )

    def cut(self, label: str, planned: Stage, heal: Stage | None) -> Stage:
        """The checkpoint of the plan that lies in a stage's folder."""
        plan_file, link = planned.folder / stages.PLAN, self.recipe.cut.link
        return self.stage(
            "cut",
            label,
            {"model": self.base.fingerprint, "plan": store.sha256_file(plan_file), "link": link},
            (planned.key, *((heal.key,) if heal else ())),
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

    def verify(self, label: str, planned: Stage, heal: Stage | None, cut: Stage) -> Stage:
        """The written bytes against plan and record."""
        return self.stage(
            "verify",
            label,
            {"model": self.base.fingerprint},
            (cut.key,),
            lambda folder: stages.verified(
                cut.folder / MODEL,
                self.base,
                planned.folder / stages.PLAN,
                folder,
                healed=healed_of(heal),
                progress=self.progress,
            ),
        )

    def measure(self, words: Measure, cuts: Mapping[str, Stage]) -> None:
        """KLD of every candidate, by the criterion's name."""
        corpus = stages.corpus_of(words, self.base)
        settings = words.model_dump(mode="json", exclude={"corpus", "max_mean_nats", "floor"})
        done = self.stage(
            "kld",
            "",
            {"model": self.base.fingerprint, "corpus": corpus.hash, "candidates": list(cuts), **settings},
            tuple(cut.key for cut in cuts.values()),
            lambda folder: stages.kld(
                self.base,
                {name: cut.folder / MODEL for name, cut in cuts.items()},
                corpus,
                words,
                folder,
                progress=self.progress,
            ),
        )
        self.result.measured = stages.measured(done.folder, list(cuts))

    def answers(self, words: CanaryWords) -> Path:
        """Where the base's answers are kept; other settings are other answers, and a stale file would be refused."""
        key = store.fingerprint({"settings": head_stages.canary_settings(words).identity()})[:12]
        return self.result.folder / f"base-answers-{key}.json"

    def cut_model(self, suffix: str) -> Checkpoint:
        """The cut, called by its base's last name and the suffix."""
        assert self.result.model is not None
        name = f"{self.base.name.rpartition('/')[2].partition('@')[0].replace(':', '-')}-{suffix}"
        return open_checkpoint(self.result.model, name)

    def times(self) -> list[tuple[str, float, int]]:
        """Seconds and peak memory of the stages."""
        return [(s.folder.name.rsplit("-", 1)[0], s.seconds, s.peak_rss_bytes) for s in self.result.done]

    def facts(self, cut: Checkpoint, quantised: Quantised | None, packed: Packed | None) -> ReportData:
        """What the report says whatever was cut."""
        from gemcut import reporting  # matplotlib takes a second that the other stages need not wait for

        return reporting.facts(
            self.recipe,
            self.base,
            cut,
            measured=self.result.measured or {},
            times=self.times(),
            quantised=quantised,
            packed=packed,
        )


def healed_of(heal: Stage | None) -> Path | None:
    """Where a heal's tensors lie."""
    return None if heal is None else heal.folder / HEALED


def heal_in(heal: Stage | None) -> HealReport | None:
    """What a heal found."""
    return None if heal is None else load_heal(heal.folder / HEALED / HEAL_FILE)
