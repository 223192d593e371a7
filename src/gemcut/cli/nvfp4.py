"""`gemcut nvfp4`, and what `gemcut verify` does with such a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemcut.cli import options
from gemcut.cli.console import Talk
from gemcut.cli.sizes import size

if TYPE_CHECKING:
    from gemcut.checkpoint import Checkpoint
    from gemcut.export.nvfp4.run import Nvfp4Report, Prepared
    from gemcut.export.nvfp4.scales import Method
    from gemcut.nvfp4.layout import Layout

_SHOWN = 5


@click.command()
@click.argument("model")
@click.option(
    "--scheme",
    type=click.Choice(["NVFP4A16", "NVFP4"], case_sensitive=False),
    default="NVFP4A16",
    show_default=True,
    help="Four-bit weights; NVFP4 has four-bit activations too, and wants --stats.",
)
@click.option(
    "--targets",
    type=click.Choice(["mlp", "mlp+experts", "all"]),
    default="mlp+experts",
    show_default=True,
    help="What is quantised; all takes attention as well.",
)
@options.out_folder
@click.option("--stats", type=click.Path(), help="A folder of gemcut observe on this model.")
@click.option(
    "--scales",
    type=click.Choice(["minmax", "four_over_six", "sweep", "weighted"]),
    help="Rule of block scales. By default weighted with --stats, sweep without.",
)
@click.option(
    "--activations",
    type=click.Choice(["max", "headroom"]),
    default="max",
    show_default=True,
    help="Rule of the activations' scale, for NVFP4.",
)
@click.option(
    "--max-borrowed",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="Share of a layer's experts that may take their peers' activation scale; more is exit code 5.",
)
@click.option(
    "--kv",
    type=click.Choice(["none", "one", "bound", "calibrated"]),
    default="none",
    show_default=True,
    help="Scales of an FP8 cache: 1, what nothing overflows, or what was seen (--stats).",
)
@click.option(
    "--layout",
    type=click.Choice(["compressed-tensors", "modelopt"]),
    default="compressed-tensors",
    show_default=True,
    help="Names of the tensors on disk.",
)
@click.option("--ignore", multiple=True, metavar="REGEX", help="Modules that stay, as 'layers.0.mlp'; many times.")
@click.option(
    "--narrow",
    type=click.Choice(["keep", "refuse"]),
    default="keep",
    show_default=True,
    help="Matrices whose width is no multiple of 16 stay as they are, or are an error.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that quantise; by default one for each free core.")
@click.option("--convert", is_flag=True, help="MODEL is an NVFP4 folder already: write it in --layout, losslessly.")
@click.option("--copy", is_flag=True, help="Copy unchanged shards instead of hard-linking them.")
@options.force
@options.dry_run
@options.talk
def nvfp4(
    model: str,
    out: str,
    stats: str | None,
    scales: Method | None,
    convert: bool,
    copy: bool,
    force: bool,
    dry_run: bool,
    talk: Talk,
    **words: Any,
) -> None:
    """Write an NVFP4 checkpoint straight from safetensors.

    Experts come apart, as servers want them; what is not quantised stays byte for byte. nvfp4.json says what became of
    every module. A run that was killed starts again.
    """
    from gemcut import machine, models
    from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4

    if convert:
        _convert(model, Path(out), words["layout"], force, dry_run, copy, talk)
        return
    base = models.open_any(model)
    words["ignore"] = tuple(words["ignore"])
    words["threads"] = words["threads"] or machine.free_cores()
    prepared = prepare(base, Settings(scales=scales or "", **words), Path(stats) if stats else None)
    if dry_run:
        _show_sizes(prepared, Path(out), talk)
        return
    _show_left(prepared, talk)
    _show(write_nvfp4(prepared, Path(out), force=force, link=not copy, progress=talk.progress), out, talk)


def _show_sizes(prepared: Prepared, out: Path, talk: Talk) -> None:
    from gemcut.export.nvfp4.run import estimate

    found = estimate(prepared, out)
    talk.table(
        "Dry run: nothing was written",
        ("part", "linears", "parameters", "before", "after", "bits per weight"),
        [
            (
                part.part,
                part.modules,
                part.parameters,
                size(part.size_bytes_before),
                size(part.size_bytes),
                f"{8 * part.size_bytes / part.parameters:.3f}",
            )
            for part in found.parts
        ],
        note=f"{size(found.size_bytes_before)} → {size(found.size_bytes)} ({found.size_bytes} bytes), {found.scales} "
        f"scales; disk: {size(found.write_bytes)} needed, {size(found.free_bytes)} free; memory: "
        f"{size(found.memory_bytes)} of {size(found.available_bytes)} available",
    )
    _show_left(prepared, talk)
    talk.result(found, path=str(out), text="")


def _show_left(prepared: Prepared, talk: Talk) -> None:
    for why, count in Counter(prepared.choice.left.values()).items():
        first = next(name for name, reason in prepared.choice.left.items() if reason == why)
        talk.say(f"{count} linears stay as they are, {first} first: {why}")
    if prepared.borrowed:
        talk.say(f"{len(prepared.borrowed)} linears of experts saw too little text and borrow from their peers")


def _show(report: Nvfp4Report, out: str, talk: Talk) -> None:
    talk.result(
        report,
        path=out,
        text=f"{out}: {size(report.size_bytes_before)} → {size(report.size_bytes)}, {report.modules} linears in "
        f"{report.scheme}; relative error {report.relative_error:.4f} on average, {report.worst[1]:.4f} at most "
        f"({report.worst[0]})",
    )


def _convert(model: str, out: Path, layout: Layout, force: bool, dry_run: bool, copy: bool, talk: Talk) -> None:
    from gemcut import models
    from gemcut.export.nvfp4.convert import convert, plan_conversion

    source = models.open_any(model)
    meant = plan_conversion(source, layout)
    if dry_run:
        talk.result(
            {"modules": meant.modules, "inexact": meant.inexact},
            path=str(out),
            text=f"{out}: {meant.modules} linears would be written as {layout} has them; nothing was written",
        )
        return
    if meant.inexact:
        talk.say(f"{meant.inexact} scales have a reciprocal that float32 cannot turn back: the last bit may change")
    manifest = convert(meant, out, force=force, link=not copy, progress=talk.progress)
    talk.result(manifest, path=str(out), text=f"{out}: {meant.modules} linears, as {layout} has them")


def nvfp4_folder(model: str) -> Checkpoint | None:
    """The checkpoint, where its config.json speaks of NVFP4 weights."""
    from gemcut.checkpoint import open_checkpoint
    from gemcut.nvfp4.layout import is_nvfp4

    if not Path(model).is_dir():
        return None
    found = open_checkpoint(Path(model), any_architecture=True)
    return found if is_nvfp4(found.config) else None


def verify_folder(found: Checkpoint, base: str, talk: Talk) -> None:
    """Structure and numbers against the base, and every byte against the record."""
    from gemcut import models, stages
    from gemcut.export.nvfp4.check import verify_nvfp4

    report = verify_nvfp4(found, models.open_model(base), progress=talk.progress)
    error, (module, worst) = report.relative_error, report.worst
    rows = [
        ("linears in " + report.scheme, f"{report.modules}, {report.bits_per_weight:.3f} bits per weight"),
        ("they read back", f"relative error {error:.4f} on average, {worst:.4f} at most ({module})"),
        ("scales", "finite, plausible, shared where servers fuse"),
        ("ignore list", "says what the tensors say, under the names and rules of vLLM"),
        ("everything else", f"{report.untouched} tensors are the base's, byte for byte"),
        ("size", f"{100 * report.size_ratio:.1f} % of the base"),
    ]
    rows += [("FP8 cache", "scales of every layer are plausible")] if report.cache else []
    rows += [(one.name, one.detail) for one in stages.checks(report.verified)]
    talk.table("Verified", ("check", "", ""), [(name, "passed", detail) for name, detail in rows])
    talk.result(report, path=str(found.path), text="")
