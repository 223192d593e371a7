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
from functools import partial
from pathlib import Path

from gemcut import machine, models, stages, store
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.recipe import STAGES, Choice, Recipe, resolved
from gemcut.types import Json, KldResult

log = logging.getLogger(__name__)

# Raise a number when the stage's result changes for the same inputs: old folders are then done again.
VERSIONS: Mapping[str, int] = {"observe": 1, "plan": 1, "cut": 1, "verify": 1, "kld": 1}

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
        _run(result, until, force, progress)
    return result


def _run(result: Run, until: str, force: bool, progress: Progress | None) -> None:
    recipe = result.recipe
    last = STAGES.index(until)
    stage = _Stages(result, force=force)
    base = models.open_model(recipe.model)
    choices = _choices(recipe)

    seen = stages.read_corpus(
        recipe.observe.corpus, base, recipe.observe.max_tokens, recipe.observe.max_tokens_per_item
    )
    settings = recipe.observe.model_dump(mode="json", exclude={"corpus", "max_memory_gib", "batch_tokens"})
    observed = stage(
        "observe",
        "",
        {"model": base.fingerprint, "corpus": seen.hash, **settings},
        (),
        lambda folder: stages.observe(
            base, seen, folder / "statistics", recipe.observe, force=force, progress=progress
        ),
    )
    statistics = observed.folder / "statistics"
    if last < STAGES.index("plan"):
        return

    plans: dict[str, Stage] = {}
    for choice in choices:
        plans[choice.name] = stage(
            "plan",
            choice.name,
            {"choice": choice.model_dump(mode="json"), "plan": recipe.plan.model_dump(mode="json")},
            (observed.key,),
            partial(stages.plan, statistics, choice, recipe.plan, force=True),
        )
    if last < STAGES.index("cut"):
        return

    cuts: dict[str, Stage] = {}
    for choice in choices:
        plan_file = plans[choice.name].folder / stages.PLAN
        cuts[choice.name] = stage(
            "cut",
            choice.name,
            {"model": base.fingerprint, "plan": store.sha256_file(plan_file), **recipe.cut.model_dump(mode="json")},
            (plans[choice.name].key,),
            partial(_cut, base, plan_file, recipe.cut.link, progress),
        )
    chosen = result.chosen = choices[0].name
    result.model = cuts[chosen].folder / "model"
    if last < STAGES.index("verify"):
        return

    verified = stage(
        "verify",
        chosen,
        {"model": base.fingerprint},
        (cuts[chosen].key,),
        lambda folder: stages.verified(
            cuts[chosen].folder / "model", base, plans[chosen].folder / stages.PLAN, folder, progress=progress
        ),
    )
    if last < STAGES.index("kld"):
        return

    measured: Stage | None = None
    if recipe.kld is not None:
        words = recipe.kld
        text = stages.read_corpus(words.corpus, base, words.max_tokens, words.max_tokens_per_item)
        measured = stage(
            "kld",
            "",
            {
                "model": base.fingerprint,
                "corpus": text.hash,
                "candidates": [c.name for c in choices],
                **words.model_dump(mode="json", exclude={"corpus", "max_mean_nats"}),
            },
            tuple(cuts[c.name].key for c in choices),
            lambda folder: stages.kld(
                base,
                {c.name: cuts[c.name].folder / "model" for c in choices},
                text,
                words,
                folder,
                progress=progress,
            ),
        )
        result.measured = stages.measured(measured.folder, [c.name for c in choices])
    if last >= STAGES.index("report"):
        from gemcut import reporting

        result.report = reporting.write(
            recipe,
            base,
            open_checkpoint(result.model, f"{base.name.rpartition('/')[2].replace(':', '-')}-{recipe.plan.keep}e"),
            statistics=statistics,
            planned={name: stages.load_planned(s.folder) for name, s in plans.items()},
            checks=stages.load_checks(verified.folder),
            measured=result.measured or {},
            times=[(s.folder.name.rsplit("-", 1)[0], s.seconds, s.peak_rss_bytes) for s in result.done],
            out=result.folder / "report",
        )
    if measured is not None:
        _gate(recipe, measured.folder, chosen)


def _cut(base: Checkpoint, plan_file: Path, link: bool, progress: Progress | None, folder: Path) -> None:
    stages.cut(base, plan_file, folder / "model", link=link, force=True, progress=progress)


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


def _gate(recipe: Recipe, measured: Path, chosen: str) -> None:
    limit = recipe.kld.max_mean_nats if recipe.kld else None
    if limit is None:
        return
    mean = stages.mean_kld(measured, chosen)
    if mean.value > limit:
        raise QualityError(
            "the KLD gate failed; the work is kept",
            where=f"kld of {chosen}",
            got=f"{mean.value:.4f} nats [{mean.low:.4f}, {mean.high:.4f}] (n = {mean.n} chunks)",
            wanted=f"at most {limit:.4f}",
            hint="keep more experts (--set plan.keep=…) or try another criterion (--set score.criterion=…)",
        )
