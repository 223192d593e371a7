"""Recipe → stages → run folder. The only file that knows the order.

    runs/NAME/
      recipe.yaml  resolved.yaml             as written · every default filled in
      observe-KEY/  plan-LABEL-KEY/  cut-LABEL-KEY/model/  verify-LABEL-KEY/  kld-KEY/
      report/{index.html, README.md, *.svg}  the page and the card
    Every stage folder has a stage.json, written last: key, parameters, parents, seconds, peak memory, stack.

KEY is a hash of the stage's name, its declared version, its parameters and its parents' keys, so a changed recipe
redoes what depends on the change and nothing else. A stage without stage.json is not finished and is done again
(`observe` goes on from its last whole layer).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemcut import machine, models, stages, store
from gemcut.checkpoint import open_checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.recipe import STAGES, Choice, Measure, Recipe, resolved
from gemcut.types import Json, KldResult

log = logging.getLogger(__name__)

# Raise a number when the stage's result changes for the same inputs: old folders are then done again.
VERSIONS: Mapping[str, int] = {"observe": 1, "plan": 1, "cut": 1, "verify": 1, "kld": 1}

STATISTICS = "statistics"  # inside the observe stage's folder
MODEL = "model"  # inside a cut stage's folder

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """One finished or found stage."""

    name: str
    key: str
    folder: Path
    seconds: float
    peak_rss_bytes: int
    reused: bool


@dataclass(slots=True)
class Run:
    """What a recipe left behind. `folder` is the run folder."""

    recipe: Recipe
    folder: Path
    done: list[Stage] = field(default_factory=list)
    model: Path | None = None
    report: Path | None = None
    chosen: str | None = None
    measured: dict[str, KldResult] | None = None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One run per folder: the lock goes with the process, so a killed run leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                "another gemcut works in this run folder",
                where=str(folder),
                hint="wait for it, or choose another --runs",
            ) from None
        yield


class _Stages:
    """Runs stages once: looks for a finished folder of the same key first."""

    def __init__(self, run: Run, *, force: bool) -> None:
        self.run = run
        self.force = force

    def __call__(
        self,
        name: str,
        label: str,
        params: Mapping[str, object],
        parents: tuple[str, ...],
        build: Callable[[Path], object],
    ) -> Stage:
        version = VERSIONS[name]
        plain: dict[str, Json] = json.loads(store.canonical_json(dict(params)))
        key = store.fingerprint({"stage": name, "version": version, "params": plain, "parents": list(parents)})[:12]
        folder = self.run.folder / "-".join(part for part in (name, label, key) if part)
        record = folder / "stage.json"
        if record.is_file() and not self.force:
            found = store.read_json(record, "stage record")
            if found.get("key") == key:
                stage = Stage(name, key, folder, _number(found, "seconds"), int(_number(found, "peak_rss_bytes")), True)
                self.run.done.append(stage)
                log.info("%s: finished before, kept", folder.name)
                return stage
        folder.mkdir(parents=True, exist_ok=True)
        machine.reset_peak()
        start = time.perf_counter()
        build(folder)
        seconds = time.perf_counter() - start
        peak = machine.peak_rss_bytes()
        store.write_json(
            record,
            {
                "stage": name,
                "label": label,
                "version": version,
                "key": key,
                "params": plain,
                "parents": list(parents),
                "seconds": round(seconds, 3),
                "peak_rss_bytes": peak,
                "stack": dict(machine.stack()),
            },
        )
        stage = Stage(name, key, folder, seconds, peak, False)
        self.run.done.append(stage)
        log.info("%s: %.1f s, peak memory %.2f GiB", folder.name, seconds, peak / 2**30)
        return stage


def _number(record: Mapping[str, Json], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


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
    with _lock(result.folder):
        store.write_bytes(result.folder / "recipe.yaml", (source or resolved(recipe)).encode())
        store.write_bytes(result.folder / "resolved.yaml", resolved(recipe).encode())
        _Job(result, force, progress).until(until)
    return result


class _Job:
    """One run of one recipe: each method is one stage and returns what the next ones stand on."""

    def __init__(self, result: Run, force: bool, progress: Progress | None) -> None:
        self.recipe = result.recipe
        self.result = result
        self.force = force
        self.progress = progress
        self.stage = _Stages(result, force=force)
        self.base = models.open_model(self.recipe.model)
        self.choices = _choices(self.recipe)
        self.chosen = self.choices[0].name

    def until(self, name: str) -> None:
        """Every stage in order, up to the one of this name."""
        last = STAGES.index(name)
        observed = self.observe()
        if last < STAGES.index("plan"):
            return
        plans = {choice.name: self.plan(choice, observed) for choice in self.choices}
        if last < STAGES.index("cut"):
            return
        cuts = {name: self.cut(name, planned) for name, planned in plans.items()}
        self.result.chosen = self.chosen
        self.result.model = cuts[self.chosen].folder / MODEL
        if last < STAGES.index("verify"):
            return
        verified = self.verify(plans[self.chosen], cuts[self.chosen])
        if last < STAGES.index("kld"):
            return
        if self.recipe.kld is not None:
            measured = self.measure(self.recipe.kld, cuts)
            self.result.measured = stages.measured(measured.folder, list(cuts))
        if last >= STAGES.index("report"):
            self.report(observed, plans, verified)
        _gate(self.recipe, self.result.measured or {}, self.chosen)

    def observe(self) -> Stage:
        words = self.recipe.observe
        corpus = stages.read_corpus(words.corpus, self.base, words.max_tokens, words.max_tokens_per_item)
        # what only bounds memory does not change the sums, so that it is no part of the key
        settings = words.model_dump(mode="json", exclude={"corpus", "max_memory_gib", "batch_tokens"})
        return self.stage(
            "observe",
            "",
            {"model": self.base.fingerprint, "corpus": corpus.hash, **settings},
            (),
            lambda folder: stages.observe(
                self.base, corpus, folder / STATISTICS, words, force=self.force, progress=self.progress
            ),
        )

    def plan(self, choice: Choice, observed: Stage) -> Stage:
        words = self.recipe.plan
        return self.stage(
            "plan",
            choice.name,
            {"choice": choice.model_dump(mode="json"), "plan": words.model_dump(mode="json")},
            (observed.key,),
            lambda folder: stages.plan(observed.folder / STATISTICS, choice, words, folder, force=True),
        )

    def cut(self, name: str, planned: Stage) -> Stage:
        plan_file, link = planned.folder / stages.PLAN, self.recipe.cut.link
        return self.stage(
            "cut",
            name,
            {"model": self.base.fingerprint, "plan": store.sha256_file(plan_file), "link": link},
            (planned.key,),
            lambda folder: stages.cut(
                self.base, plan_file, folder / MODEL, link=link, force=True, progress=self.progress
            ),
        )

    def verify(self, planned: Stage, cut: Stage) -> Stage:
        return self.stage(
            "verify",
            self.chosen,
            {"model": self.base.fingerprint},
            (cut.key,),
            lambda folder: stages.verified(
                cut.folder / MODEL, self.base, planned.folder / stages.PLAN, folder, progress=self.progress
            ),
        )

    def measure(self, words: Measure, cuts: Mapping[str, Stage]) -> Stage:
        corpus = stages.read_corpus(words.corpus, self.base, words.max_tokens, words.max_tokens_per_item)
        settings = words.model_dump(mode="json", exclude={"corpus", "max_mean_nats"})
        return self.stage(
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

    def report(self, observed: Stage, plans: Mapping[str, Stage], verified: Stage) -> None:
        from gemcut import reporting  # matplotlib takes a second that the other stages need not wait for

        assert self.result.model is not None
        kept = self.recipe.plan.keep
        name = f"{self.base.name.rpartition('/')[2].partition('@')[0].replace(':', '-')}-{kept}e"
        self.result.report = reporting.write(
            self.recipe,
            self.base,
            open_checkpoint(self.result.model, name),
            statistics=observed.folder / STATISTICS,
            planned={label: stages.load_planned(planned.folder) for label, planned in plans.items()},
            checks=stages.load_checks(verified.folder),
            measured=self.result.measured or {},
            times=[(s.folder.name.rsplit("-", 1)[0], s.seconds, s.peak_rss_bytes) for s in self.result.done],
            out=self.result.folder / "report",
        )


def _choices(recipe: Recipe) -> list[Choice]:
    """The chosen criterion first, then the ones it is compared with; labels must differ."""
    choices = [recipe.score, *recipe.compare]
    names = [choice.name for choice in choices]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            "two criteria of the recipe have the same name", got=", ".join(sorted(twice)), hint="give one a label"
        )
    return choices


def _gate(recipe: Recipe, measured: Mapping[str, KldResult], chosen: str) -> None:
    limit = recipe.kld.max_mean_nats if recipe.kld else None
    if limit is None or chosen not in measured:
        return
    mean = next(row.mean for row in measured[chosen].rows if row.cls == "all")
    if mean.value > limit:
        raise QualityError(
            "the KLD gate failed; the work is kept",
            where=f"kld of {chosen}",
            got=f"{mean.value:.4f} nats [{mean.low:.4f}, {mean.high:.4f}] (n = {mean.n} chunks)",
            wanted=f"at most {limit:.4f}",
            hint="keep more experts (--set plan.keep=…) or try another criterion (--set score.criterion=…)",
        )
