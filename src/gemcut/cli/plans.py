"""`gemcut plan experts` and `gemcut plan heads`."""

from __future__ import annotations

from pathlib import Path

import click

from gemcut.cli import options
from gemcut.cli.console import Talk


@click.group()
def plan() -> None:
    """Decide which units stay, and say why."""


@plan.command()
@click.argument("stats")
@click.option("--keep", required=True, type=click.IntRange(min=1), help="Experts kept in every layer.")
@click.option("--criterion", default="easy_ep", show_default=True, help="gemcut list criteria.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the criterion.")
@click.option("-o", "--out", type=click.Path(), help="Where plan.json goes.")
@click.option("--explain", metavar="LAYER:EXPERT", help="Why one expert stays or goes, in one screen.")
@click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="A guard, e.g. guards.class_floor=8.")
@options.force
@options.talk
def experts(
    stats: str,
    keep: int,
    criterion: str,
    params: tuple[str, ...],
    out: str | None,
    explain: str | None,
    sets: tuple[str, ...],
    force: bool,
    talk: Talk,
) -> None:
    """Keep the best N experts of every layer."""
    from gemcut import plan_stages, recipe, stages
    from gemcut.errors import UsageError

    if out is None and explain is None:
        raise UsageError("nothing to do", wanted="-o plan.json, --explain LAYER:EXPERT, or both")
    choice = recipe.Choice(criterion=criterion, params=recipe.params(params))
    planned = plan_stages.plan_experts(Path(stats), choice, recipe.plan_words(keep, sets))
    if out is not None:
        stages.save_plan(planned.plan, Path(out), force=force)
    if explain is not None:
        found = plan_stages.explain(planned, Path(stats), *_unit(explain))
        talk.result(found, path=out, text=found.text())
        return
    doubtful, guarded = planned.doubtful, planned.kept_by_guards
    talk.result(
        planned.plan,
        path=out,
        text=f"{out}: keeps {keep} of {planned.plan.units} experts in {len(planned.plan.layers)} layers by {criterion}"
        + (f"; {guarded} stay only because a guard keeps them" if guarded else "")
        + (f"; {doubtful} decisions change in more than one of five resamples of the questions" if doubtful else ""),
    )


@plan.command()
@click.argument("stats")
@click.option("--model", help="The observed model; by default the name that the statistics give.")
@click.option(
    "--drop", required=True, type=click.FloatRange(min=0, min_open=True), help="A share of a layer's heads, or a count."
)
@click.option("--layers", metavar="RANGES", help="For example 0-3,5; all by default.")
@click.option("--structural", is_flag=True, help="Take rows and columns out instead of writing zeros.")
@click.option(
    "--gguf-only", is_flag=True, help="Structural in some layers and not in others: for gemcut gguf --plan alone."
)
@click.option("--criterion", default="obs", show_default=True, help="gemcut list criteria.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the criterion.")
@click.option("--importance", type=click.Path(), help="What gemcut ablate measured, for loo and taylor.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Where plan.json goes.")
@options.force
@options.talk
def heads(
    stats: str,
    model: str | None,
    drop: float,
    layers: str | None,
    structural: bool,
    gguf_only: bool,
    criterion: str,
    params: tuple[str, ...],
    importance: str | None,
    out: str,
    force: bool,
    talk: Talk,
) -> None:
    """Drop the least important query heads, evenly over the KV heads."""
    from gemcut import head_stages, models, recipe, records, stages
    from gemcut.records.importance import load_importance

    mode = "structural" if structural or gguf_only else "mask"
    words = recipe.head_words({"drop": drop, "layers": layers, "mode": mode})
    base = models.open_model(model or records.load_statistics_index(Path(stats)).meta.model_name)
    planned = head_stages.plan_heads(
        base,
        Path(stats),
        recipe.Choice(criterion=criterion, params=recipe.params(params)),
        words,
        load_importance(Path(importance)) if importance else None,
        gguf_only=gguf_only,
        progress=talk.progress,
    )
    stages.save_plan(planned.plan, Path(out), force=force)
    for note in planned.notes:
        talk.say(note)
    talk.result(
        planned.plan,
        path=out,
        text=f"{out}: drops {planned.dropped} of {planned.plan.units} query heads in {len(planned.plan.layers)} "
        f"layers by {criterion}",
    )


def _unit(text: str) -> tuple[int, int]:
    from gemcut.errors import UsageError

    layer, _, unit = text.partition(":")
    if not (layer.isdigit() and unit.isdigit()):
        raise UsageError("--explain wants LAYER:EXPERT", got=text, wanted="for example 4:17")
    return int(layer), int(unit)
