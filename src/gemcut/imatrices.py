"""Importance matrices from whatever there is: a model and a corpus, statistics, or other importance matrices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from gemcut import machine, models, preflight, recipe, stages, store, surgery
from gemcut.checkpoint import Checkpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix import (
    PRIOR_TOKENS,
    Choice,
    Coverage,
    Imatrix,
    Variant,
    choose,
    coverage,
    fit,
    from_statistics,
    merge,
    read_imatrix,
    refuse_unaddable,
    take,
    write_imatrix,
)
from gemcut.export.layout import layout_of
from gemcut.export.mix import stock
from gemcut.families.gguf import GgufLayout
from gemcut.recipe import Observe
from gemcut.records import load_plan
from gemcut.records.fields import to_json
from gemcut.records.statistics import STATISTICS_FILE, load_statistics_index
from gemcut.types import Json

if TYPE_CHECKING:
    from gemcut.stream.corpus import Corpus

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
RECORD = ".json"  # behind the file's name
AUTO_ROUNDINGS = 8


@dataclass(frozen=True, slots=True)
class ImatrixWords:
    """What is asked of an importance matrix.

    variant: `plain`, `hybrid`, `rms4`, `max`, `auto`.   target: file type that `auto` judges by.
    prior: rows that starved experts borrow from their layer's mean.   merge: other files to add.
    roundings: of how many quantisations each block is picked at export; 1: quantised once, as by llama-quantize.
    """

    variant: Variant = "plain"
    target: str = ""
    prior: int = PRIOR_TOKENS
    merge: tuple[Path, ...] = ()
    roundings: int = 1


@dataclass(frozen=True, slots=True)
class ImatrixReport:
    """A written file.   choices: of `auto`, one for each tensor."""

    file: str
    sha256: str
    size_bytes: int
    variant: str
    target: str
    entries: int
    prior_tokens: int
    roundings: int
    datasets: tuple[str, ...]
    model_fingerprint: str
    corpus_hash: str
    coverage: Coverage
    choices: tuple[Choice, ...]


def words_of(
    variant: str, target: str | None, prior: int, merge_with: Sequence[str], roundings: int | None = None
) -> ImatrixWords:
    """From the flags of the verb.

    Whatever an observation would only be followed by a refusal of is refused here, before it.

    Raises:
        UsageError: flags that do not go together, no such file type, or no file to merge, or one that does not add up.
        CheckpointError: a file to merge is damaged.
    """
    if variant not in get_args(Variant):
        raise UsageError("no such variant of importances", got=variant, wanted=", ".join(get_args(Variant)))
    if (variant == "auto") != bool(target):
        raise UsageError(
            "auto judges by the quantisers of one file type" if variant == "auto" else "--for belongs to auto",
            got=f"--variant {variant}" + (f" --for {target}" if target else ""),
            wanted="--variant auto --for IQ2_M",
        )
    if target:
        stock.file_type(target)
    if merge_with and variant != "plain":
        raise UsageError("only sums of squares add up", got=f"--variant {variant} --merge", wanted="--variant plain")
    rounds = (AUTO_ROUNDINGS if variant == "auto" else 1) if roundings is None else roundings
    if merge_with and rounds > 1:
        raise UsageError("only sums of squares add up", got=f"--roundings {rounds} --merge", wanted="--roundings 1")
    for one in merge_with:
        refuse_unaddable(read_imatrix(Path(one)))
    return ImatrixWords(cast(Variant, variant), target or "", prior, tuple(Path(one) for one in merge_with), rounds)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Statistics.   words, corpus: of the observation that makes them; None where they are there already."""

    statistics: Path
    base: Checkpoint
    words: Observe | None = None
    corpus: Corpus | None = None

    def observe(self, *, force: bool = False, progress: Progress | None = None) -> None:
        """Make the statistics, where they are not there yet. They stay: other variants need no second pass."""
        if self.words is not None and self.corpus is not None:
            stages.observe(self.base, self.corpus, self.statistics, self.words, force=force, progress=progress)
            log.info("statistics are kept in %s", self.statistics)

    def estimate(self, words: ImatrixWords, out: Path) -> preflight.Preflight:
        """What it would read, write and need."""
        weights = words.variant in ("hybrid", "auto")
        return preflight.estimate_imatrix(
            self.base, self.corpus, self.words, self.statistics, looks_at_weights=weights, out=out
        )


def source_of(
    named: str, model: str | None, said: Mapping[str, Json] | None, sets: tuple[str, ...], out: Path
) -> Source:
    """A statistics folder, or a model that is observed beside `out` on the corpus of `said`.

    Raises:
        UsageError: a model without a corpus, statistics with one, or a model that cannot be found.
    """
    path = Path(named)
    if (path / STATISTICS_FILE).is_file():
        if said is not None:
            raise UsageError("statistics were observed already", got="--corpus", wanted="a model, or no corpus")
        meta = load_statistics_index(path).meta
        base = models.open_model(model or meta.model_name)
        if base.fingerprint != meta.model_fingerprint:
            log.warning("%s is not the very model that was observed; its shapes decide whether it can serve", base.name)
        return Source(path, base)
    base = models.open_model(named)
    if said is None:
        raise UsageError("a model is observed on a corpus", wanted="--corpus", hint="or name statistics of it")
    words = recipe.observe_words(dict(said), sets)
    return Source(out.with_name(f"{out.name}.statistics"), base, words, stages.corpus_of(words, base))


def from_observation(
    statistics: Path, base: Checkpoint, words: ImatrixWords, *, progress: Progress | None = None
) -> tuple[Imatrix, GgufLayout, tuple[Choice, ...]]:
    """Statistics → importances, merged with what the words name. Raises as `from_statistics`, `choose` and `merge`."""
    layout = layout_of(base)
    choices: tuple[Choice, ...] = ()
    if words.variant == "auto":
        types = stock.stock_types(words.target, layout, imatrix=True)
        choices = choose(
            statistics,
            layout,
            base,
            types,
            roundings=words.roundings,
            prior=words.prior,
            threads=machine.free_cores(),
            progress=progress,
        )
    made = from_statistics(
        statistics,
        layout,
        variant=words.variant,
        chosen={one.tensor: one.variant for one in choices},
        roundings=words.roundings,
        rounded={one.tensor for one in choices if one.picks} if choices else None,
        checkpoint=base,
        prior=words.prior,
    )
    return _merged(made, words), layout, choices


def from_files(
    first: Path, words: ImatrixWords, model: str | None, plan_file: Path | None = None
) -> tuple[Imatrix, GgufLayout | None]:
    """An importance matrix that exists, merged with others; held against a model where one is named, and cut like it
    where there is a plan.

    Raises:
        UsageError: nothing to do, no such file, importances that do not add up, or a plan without its model.
        CheckpointError: a damaged file, files of different models, or a plan of another one.
    """
    if plan_file is not None and model is None:
        raise UsageError("the plan's model is not named", got="--plan", wanted="--plan PLAN --model MODEL")
    made = _merged(read_imatrix(first), words)
    if model is None:
        return made, None
    base = models.open_model(model)
    layout = layout_of(base)
    if plan_file is None:
        return fit(made, layout), layout
    cut = surgery.cut_for_gguf(base, load_plan(plan_file))
    return take(made, layout, cut.edits), layout_of(cut)


def _merged(made: Imatrix, words: ImatrixWords) -> Imatrix:
    for other in words.merge:
        made = merge(made, read_imatrix(other))
    return made


def save(
    imatrix: Imatrix,
    layout: GgufLayout | None,
    choices: tuple[Choice, ...],
    words: ImatrixWords,
    out: Path,
    *,
    force: bool = False,
) -> ImatrixReport:
    """Write the file, and what is known of it beside it (`FILE.json`), which comes last."""
    record = out.with_name(out.name + RECORD)
    if force:
        record.unlink(missing_ok=True)
    write_imatrix(out, imatrix, force=force)
    report = ImatrixReport(
        file=out.name,
        sha256=store.sha256_file(out),
        size_bytes=out.stat().st_size,
        variant=imatrix.variant,
        target=words.target,
        entries=len(imatrix.entries),
        prior_tokens=imatrix.prior_tokens,
        roundings=imatrix.roundings,
        datasets=imatrix.datasets,
        model_fingerprint=imatrix.model_fingerprint,
        corpus_hash=imatrix.corpus_hash,
        coverage=coverage(imatrix, layout),
        choices=choices,
    )
    store.write_json(record, {"schema": 1, **cast("dict[str, object]", to_json(report))})
    return report


def wins(choices: Sequence[Choice]) -> list[tuple[str, str, int, dict[str, int], dict[str, float], float]]:
    """Per role and type: tensors, how often each variant won, and mean errors as a share of plain's: of each variant,
    and of the chosen one with picked blocks."""
    out = []
    for role, kind in sorted({(one.role, one.type) for one in choices}):
        group = [one for one in choices if (one.role, one.type) == (role, kind)]
        names = list(group[0].errors)
        won = {name: sum(one.variant == name for one in group) for name in names}
        mean = {name: sum(one.errors[name] for one in group) / len(group) for name in names}
        out.append((role, kind, len(group), won, mean, sum(one.rounded for one in group) / len(group)))
    return out
