"""`gemcut imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemcut.cli import options
from gemcut.cli.console import Talk

if TYPE_CHECKING:
    from gemcut.imatrices import ImatrixReport

_LISTED = 12  # tensors with starved experts that the table shows


@click.command()
@click.argument("source")
@click.option("--corpus", help="SOURCE is a model: JSON lines, text, or demo:calibration to observe it on.")
@click.option("-o", "--out", required=True, type=click.Path(), help="The file to write.")
@click.option("--variant", default="plain", show_default=True, help="plain, hybrid, rms4, max or auto.")
@click.option("--for", "target", metavar="TYPE", help="auto: the file type that it is for, as IQ2_M.")
@click.option(
    "--roundings",
    type=click.IntRange(min=1, max=256),
    help="Let gemcut gguf pick each block of so many quantisations; 8 for auto, else 1.",
)
@click.option("--merge", multiple=True, type=click.Path(), help="Add this importance matrix, too; many times.")
@click.option("--model", help="The model behind SOURCE; by default the name that the statistics give.")
@click.option("--plan", "plan_file", type=click.Path(), help="Take what this plan keeps; SOURCE is of its --model.")
@click.option(
    "--prior", type=click.IntRange(min=0), default=64, show_default=True, help="Rows lent to a starved expert."
)
@options.max_tokens
@options.device
@options.observe_fields
@options.force
@options.dry_run
@options.talk
def imatrix(
    source: str,
    corpus: str | None,
    out: str,
    variant: str,
    target: str | None,
    roundings: int | None,
    merge: tuple[str, ...],
    model: str | None,
    plan_file: str | None,
    prior: int,
    max_tokens: int | None,
    device: str,
    sets: tuple[str, ...],
    force: bool,
    dry_run: bool,
    talk: Talk,
) -> None:
    """Importance matrix that llama.cpp reads; from statistics without a second pass.

    SOURCE is a statistics folder, a model (observed first, into OUT.statistics, which stays), or an importance matrix
    to merge others into, or to cut like its model. Exit code 5, with the file written, when the text starves too many
    experts of a layer.
    """
    from gemcut import imatrices, store
    from gemcut.cli.sizes import show_preflight
    from gemcut.errors import UsageError
    from gemcut.export.imatrix import gate

    words = imatrices.words_of(variant, target, prior, merge, roundings)
    path, target_file = Path(source), Path(out)
    store.refuse_existing(target_file, force=force or dry_run)
    if path.is_file():
        if variant != "plain" or corpus:
            raise UsageError("sums of squares are all that this file has", got="--variant or --corpus", wanted="STATS")
        options.refuse("roundings", "prior", "max_tokens", "device", "sets", wanted="statistics, or a model")
        made, layout = imatrices.from_files(path, words, model, Path(plan_file) if plan_file else None)
        if dry_run:
            talk.result(
                {"entries": len(made.entries)}, path=out, text=f"{out}: {len(made.entries)} tensors, not written"
            )
            return
        report = imatrices.save(made, layout, (), words, target_file, force=force)
    else:
        if plan_file:
            raise UsageError("a plan cuts an importance matrix that exists", got=source, wanted="its file")
        if not corpus:
            options.refuse("max_tokens", "device", "sets", wanted="a model, and --corpus")
        said = {"corpus": corpus, "max_tokens": max_tokens, "device": device}
        asked = imatrices.source_of(source, model, said if corpus else None, sets, target_file)
        if dry_run:
            show_preflight(talk, asked.estimate(words, target_file))
            return
        asked.observe(force=force, progress=talk.progress)
        made, layout, choices = imatrices.from_observation(asked.statistics, asked.base, words, progress=talk.progress)
        report = imatrices.save(made, layout, choices, words, target_file, force=force)
    _show(report, out, talk)
    gate(report.coverage)


def _show(report: ImatrixReport, out: str, talk: Talk) -> None:
    """Coverage, who won where, one line."""
    from gemcut.imatrices import wins

    found = report.coverage
    starving = sorted((one for one in found.experts if one.starved), key=lambda one: -one.starved_share)
    if found.experts:
        talk.table(
            f"{len(found.experts)} tensors of experts; {len(starving)} of them with starved ones",
            ("tensor", "experts", "rows, mean", "rows, least", "starved", "unseen"),
            [
                (one.name, one.units, f"{one.mean:.0f}", one.least, len(one.starved), len(one.unseen))
                for one in (starving or sorted(found.experts, key=lambda one: one.least))[:_LISTED]
            ],
            note="starved: fewer rows than a fifth of their layer's mean"
            + (f"; each borrowed {report.prior_tokens} rows of that mean" if starving and report.prior_tokens else ""),
        )
    if report.choices:
        names = list(report.choices[0].errors)
        talk.table(
            f"Importances for {report.target}: error of the quantised weights on held-out items, as a share of plain's",
            ("tensors", "type", "number", *names, *(f"{name} won" for name in names), "picked"),
            [
                (
                    role,
                    kind,
                    n,
                    *(f"{mean[name]:.4f}" for name in names),
                    *(won[name] for name in names),
                    f"{picked:.4f}",
                )
                for role, kind, n, won, mean, picked in wins(report.choices)
            ],
            note=f"picked: the winner, with each block picked of {report.roundings} roundings"
            if report.roundings > 1
            else "",
        )
    for name in found.missing[:_LISTED]:
        talk.say(f"{name} has no importances")
    talk.result(
        report,
        path=out,
        text=f"{out}: {report.entries} tensors, {report.variant}, "
        f"{report.coverage.tokens:,} tokens, {report.size_bytes / 2**20:.1f} MiB",
    )
