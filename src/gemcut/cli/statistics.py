"""`observe`, `merge` and `score`."""

from __future__ import annotations

from pathlib import Path

import click

from gemcut.cli import options
from gemcut.cli.console import Talk


@click.command()
@click.argument("model")
@click.option("--corpus", required=True, help="JSON lines, text, or demo:calibration.")
@options.out_folder
@options.max_tokens
@click.option(
    "--max-memory", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="Refuse or spill beyond this."
)
@options.device
@options.observe_fields
@options.force
@options.dry_run
@options.talk
def observe(
    model: str,
    corpus: str,
    out: str,
    max_tokens: int | None,
    max_memory: float | None,
    device: str,
    sets: tuple[str, ...],
    force: bool,
    dry_run: bool,
    talk: Talk,
) -> None:
    """One streamed pass over a corpus; every statistic at once; resumes."""
    from gemcut import models, recipe, stages

    words = recipe.observe_words(
        {"corpus": corpus, "max_tokens": max_tokens, "max_memory_gib": max_memory, "device": device}, sets
    )
    base = models.open_model(model)
    text = stages.corpus_of(words, base)
    if dry_run:
        from gemcut import preflight
        from gemcut.cli.sizes import show_preflight

        show_preflight(talk, preflight.estimate_observe(base, text, words, Path(out)))
        return
    talk.say(f"{base.name}: {len(text.items)} items, {text.tokens:,} tokens, classes {', '.join(text.classes)}")
    stages.observe(base, text, Path(out), words, force=force, progress=talk.progress)
    _show_statistics(talk, out)


def _show_statistics(talk: Talk, out: str) -> None:
    from gemcut import stages

    summary = stages.statistics_summary(Path(out))
    talk.result(
        summary,
        path=out,
        text=f"{out}: {summary['tokens']:,} tokens, {summary['items']} items"
        + (f", {summary['layers']} layers with experts" if summary["layers"] else ""),
    )


@click.command()
@click.argument("stats", nargs=-1, required=True)
@options.out_folder
@options.force
@options.talk
def merge(stats: tuple[str, ...], out: str, force: bool, talk: Talk) -> None:
    """Add up observations of one model on different corpora.

    The result is what one observation of all of them would be, up to rounding: a corpus can be observed in parts, on
    several machines, or grow later.
    """
    from gemcut.observe.merge import merge as add_up

    add_up([Path(one) for one in stats], Path(out), force=force, progress=talk.progress)
    _show_statistics(talk, out)


@click.command()
@click.argument("stats")
@click.option("--criterion", default="all", show_default=True, help="gemcut list criteria.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the criterion.")
@click.option("-o", "--out", type=click.Path(), help="Keep the scores in this folder (one criterion).")
@options.force
@options.talk
def score(stats: str, criterion: str, params: tuple[str, ...], out: str | None, force: bool, talk: Talk) -> None:
    """Rank the experts by a criterion. Seconds, no model."""
    from gemcut import plan_stages, recipe

    rows = plan_stages.score_table(
        Path(stats), criterion, recipe.params(params), Path(out) if out else None, force=force
    )
    talk.table(
        "Scores per layer; agreement is the share of drops shared with frequency at half the experts",
        ("criterion", "layer", "best experts", "worst experts", "agreement"),
        [
            (
                r.criterion,
                r.layer,
                " ".join(map(str, r.best)),
                " ".join(map(str, r.worst)),
                f"{100 * r.agreement:.0f} %",
            )
            for r in rows
        ],
    )
    talk.result({"rows": rows}, path=out or stats, text=out or "")
