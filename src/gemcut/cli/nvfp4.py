"""`gemcut nvfp4`, and what `gemcut verify` does with such a folder."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gemcut.cli import options
from gemcut.cli.console import Talk
from gemcut.cli.sizes import size

if TYPE_CHECKING:
    from gemcut.checkpoint import Checkpoint
    from gemcut.export.nvfp4.run import Nvfp4Report, Prepared
    from gemcut.recipe import Nvfp4Words
    from gemcut.serve import Serving

_F = TypeVar("_F", bound=Callable[..., Any])


def _word(name: str, *, choices: bool = False, **more: Any) -> Callable[[_F], _F]:
    """A flag that is a word of the recipe: its choices, its default and its meaning stand there."""
    from gemcut.vocabulary import Nvfp4Words, choices_of

    info = Nvfp4Words.model_fields[name]
    about = info.description or ""
    if choices:
        more["type"] = click.Choice(choices_of(info.annotation), case_sensitive=name != "scheme")
    if not more.get("multiple"):
        more |= {"default": info.default, "show_default": info.default is not None}
    return click.option(f"--{name.replace('_', '-')}", help=f"{about[:1].upper()}{about[1:]}.", **more)


@click.command()
@click.argument("model")
@_word("scheme", choices=True)
@_word("targets", choices=True)
@options.out_folder
@click.option("--stats", type=click.Path(), help="A folder of gemcut observe on this model.")
@_word("scales", choices=True)
@_word("activations", choices=True)
@_word("max_borrowed", type=click.FloatRange(0, 1))
@_word("kv", choices=True)
@_word("layout", choices=True)
@_word("ignore", multiple=True, metavar="REGEX")
@_word("narrow", choices=True)
@_word("device")
@_word("threads", type=click.IntRange(min=1))
@_word("drafter", metavar="MODEL")
@click.option("--convert", is_flag=True, help="MODEL is an NVFP4 folder already: write it in --layout, losslessly.")
@click.option("--copy", is_flag=True, help="Copy unchanged shards instead of hard-linking them.")
@options.force
@options.dry_run
@options.talk
def nvfp4(
    model: str,
    out: str,
    stats: str | None,
    convert: bool,
    copy: bool,
    force: bool,
    dry_run: bool,
    talk: Talk,
    **said: Any,
) -> None:
    """Write an NVFP4 checkpoint straight from safetensors.

    Experts come apart, as servers want them; what is not quantised stays byte for byte. nvfp4.json says what became of
    every module. A run that was killed starts again. The command that serves the folder is printed at the end; gemcut
    show prints it again, for other cards, contexts and drafters.
    """
    from gemcut import models, nvfp4_stages, recipe
    from gemcut.export.nvfp4.run import prepare, write_nvfp4

    words = recipe.nvfp4_words({**said, "ignore": list(said["ignore"])})
    if convert:
        _convert(model, Path(out), words, force, dry_run, copy, talk)
        return
    prepared = prepare(models.open_any(model), nvfp4_stages.settings(words), Path(stats) if stats else None)
    if dry_run:
        _show_sizes(prepared, Path(out), talk)
        return
    _show_left(prepared, talk)
    _show(write_nvfp4(prepared, Path(out), force=force, link=not copy, progress=talk.progress), out, words, talk)


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


def _show(report: Nvfp4Report, out: str, words: Nvfp4Words, talk: Talk) -> None:
    served = _serving(out, words)
    facts = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    talk.result(
        {**facts, "serving": served},
        path=out,
        text=f"{out}: {size(report.size_bytes_before)} → {size(report.size_bytes)}, {report.modules} linears in "
        f"{report.scheme}; relative error {report.relative_error:.4f} on average, {report.worst[1]:.4f} at most "
        f"({report.worst[0]})\n\n{spoken(served)}",
    )


def _serving(out: str, words: Nvfp4Words) -> Serving:
    from gemcut.checkpoint import open_checkpoint
    from gemcut.nvfp4_stages import local_model
    from gemcut.serve import ServeWords, serving

    drafter = None if words.drafter is None else local_model(words.drafter)
    return serving(open_checkpoint(Path(out), any_architecture=True), ServeWords(model=out, drafter=drafter))


def spoken(served: Serving) -> str:
    """The command, and below it what it needs."""
    return "\n".join((served.line, "", *served.needs))


def _convert(model: str, out: Path, words: Nvfp4Words, force: bool, dry_run: bool, copy: bool, talk: Talk) -> None:
    from gemcut import models
    from gemcut.export.nvfp4.convert import convert, plan_conversion

    quantising = [name for name in type(words).model_fields if name not in ("layout", "drafter")]
    options.refuse("stats", *quantising, wanted="a checkpoint that is not quantised yet, without --convert")
    meant = plan_conversion(models.open_any(model), words.layout)
    if dry_run:
        talk.result(
            {"modules": meant.modules, "inexact": meant.inexact},
            path=str(out),
            text=f"{out}: {meant.modules} linears would be written as {words.layout} has them; nothing was written",
        )
        return
    if meant.inexact:
        talk.say(f"{meant.inexact} scales have a reciprocal that float32 cannot turn back: the last bit may change")
    manifest = convert(meant, out, force=force, link=not copy, progress=talk.progress)
    served = _serving(str(out), words)
    facts = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    talk.result(
        {**facts, "serving": served},
        path=str(out),
        text=f"{out}: {meant.modules} linears, as {words.layout} has them\n\n{spoken(served)}",
    )


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
    from gemcut import models, nvfp4_stages
    from gemcut.export.nvfp4.check import verify_nvfp4

    report = verify_nvfp4(found, models.open_model(base), progress=talk.progress)
    rows = [(one.name, "passed", one.detail) for one in nvfp4_stages.checks(report)]
    talk.table("Verified", ("check", "", ""), rows)
    talk.result(report, path=str(found.path), text="")
