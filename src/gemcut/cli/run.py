"""`gemcut run` and `gemcut demo`: recipes from the first stage to the report."""

from __future__ import annotations

from pathlib import Path

import click

from gemcut.cli import options
from gemcut.cli.console import Talk

_RUNS = click.option("--runs", default="runs", show_default=True, type=click.Path(), help="Folder of run folders.")
_SET = click.option(
    "--set", "sets", multiple=True, metavar="PATH=VALUE", help="Change one recipe field, e.g. plan.keep=98."
)
_UNTIL = click.option("--until", default="report", show_default=True, metavar="STAGE", help="Last stage to do.")


@click.command()
@click.argument("recipe")
@_SET
@_UNTIL
@_RUNS
@click.option("--no-salvage", is_flag=True, help="A failed canary ends the run (exit code 5) instead of a search.")
@options.force
@options.dry_run
@options.talk
def run(
    recipe: str,
    sets: tuple[str, ...],
    until: str,
    runs: str,
    no_salvage: bool,
    force: bool,
    dry_run: bool,
    talk: Talk,
) -> None:
    """Run a recipe: observe, plan, cut, verify, kld, report. Resumes.

    RECIPE is a YAML file or the name of a shipped recipe (gemcut list recipes). Finished stages are kept; a killed
    run goes on where it stopped.
    """
    if no_salvage:
        _need_canary(recipe, sets)
        sets = (*sets, "canary.salvage=false")
    _run(recipe, sets, until, Path(runs), force, dry_run, talk)


def _need_canary(ref: str, sets: tuple[str, ...]) -> None:
    from gemcut import recipe
    from gemcut.errors import UsageError

    if recipe.load(ref, sets).canary is None:
        raise UsageError("there is nothing to salvage: the recipe has no canary", where=ref)


@click.command()
@_SET
@_UNTIL
@_RUNS
@options.force
@options.dry_run
@options.talk
def demo(sets: tuple[str, ...], until: str, runs: str, force: bool, dry_run: bool, talk: Talk) -> None:
    """The main job, end to end, on the checkpoint that ships with the project."""
    _run("demo-moe", sets, until, Path(runs), force, dry_run, talk)


def _run(ref: str, sets: tuple[str, ...], until: str, runs: Path, force: bool, dry_run: bool, talk: Talk) -> None:
    from gemcut import pipeline, recipe

    words = recipe.load(ref, sets)
    if dry_run:
        from gemcut import preflight
        from gemcut.cli.sizes import show_preflight

        show_preflight(talk, preflight.estimate(words, runs, until=until))
        return
    done = pipeline.run(words, runs, source=recipe.source(ref), until=until, force=force, progress=talk.progress)
    talk.table(
        f"{words.name}: {words.description}" if words.description else words.name,
        ("stage", "seconds", "peak memory", ""),
        [
            (
                stage.folder.name.rsplit("-", 1)[0],
                f"{stage.seconds:.1f}",
                f"{stage.peak_rss_bytes / 2**30:.2f} GiB",
                "kept from before" if stage.reused else "",
            )
            for stage in done.done
        ],
    )
    if done.measured is not None and done.chosen is not None:
        from gemcut.cli.measure import show_kld

        show_kld(talk, done.measured, title="Damage on held-out text, KL(base ‖ candidate)")
    if done.quantised:
        from gemcut.cli.measure import show_kld

        show_kld(talk, done.quantised, title="GGUF files on held-out text, KL(base ‖ file)")
    served = packed = None
    if done.packed is not None:
        from gemcut.cli.measure import show_kld
        from gemcut.nvfp4_stages import served_here

        served, packed = served_here(done.packed), done.packed.folder
        if done.packed.measured is not None:
            measured = {done.packed.name: done.packed.measured}
            show_kld(talk, measured, title="NVFP4 on held-out text, KL(base ‖ checkpoint)")
    talk.result(
        {
            "run": str(done.folder),
            "model": str(done.model) if done.model else None,
            "report": str(done.report) if done.report else None,
            "files": [str(path) for path in done.files],
            "nvfp4": str(done.packed.folder) if done.packed else None,
            "serving": served,
            "stages": [
                {
                    "name": s.name,
                    "key": s.key,
                    "seconds": s.seconds,
                    "peak_rss_bytes": s.peak_rss_bytes,
                    "reused": s.reused,
                }
                for s in done.done
            ],
        },
        path=done.report or (done.files[0].parent if done.files else packed or done.model) or done.folder,
        text="\n".join(
            line
            for line in (
                f"model   {done.model}" if done.model else "",
                f"files   {done.files[0].parent}" if done.files else "",
                f"nvfp4   {packed}" if packed else "",
                f"report  {done.report}" if done.report else "",
                f"run     {done.folder}",
                f"\n{served.line}" if served else "",
            )
            if line
        ),
    )
