"""`gemcut gguf`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemcut.cli import options
from gemcut.cli.console import Talk
from gemcut.cli.sizes import ByteSize, duration, size

if TYPE_CHECKING:
    from gemcut.export.mix.sizes import KindSize
    from gemcut.export.run import ExportReport
    from gemcut.exporting import GgufPreflight
    from gemcut.mixing import Mix
    from gemcut.types import Json


@click.command()
@click.argument("model")
@click.option(
    "-t", "--type", "types", multiple=True, help="Q4_K_M, IQ2_M, Q4_K_L, CD-Q3_K_M, …; many times for many files."
)
@click.option("--size", "sizes", multiple=True, type=ByteSize(), help="A file of at most this: the best types for it.")
@click.option("--fit", type=ByteSize(), help="The best types for a card with this much memory; see --context.")
@click.option("--context", type=click.IntRange(min=1), default=8192, show_default=True, help="With --fit: tokens.")
@click.option("--kv", default="f16", show_default=True, help="With --fit: type of the KV cache, as q8_0.")
@click.option(
    "--with", "beside", default="", help="With --fit: mmproj, drafter, or files that lie in the memory too; by commas."
)
@click.option("--curvature", type=click.Path(), help="With --size and --fit: a folder of gemcut curvature.")
@options.out_folder
@click.option("--imatrix", type=click.Path(), help="Importance matrix of gemcut imatrix or llama-imatrix.")
@click.option(
    "--tensor-type", "overrides", multiple=True, metavar="REGEX=TYPE", help="Type of some tensors, as attn_k=q6_k."
)
@click.option(
    "--tensor-type-file",
    "override_files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="The same, line by line from a file; # begins a comment. What --tensor-type says comes first.",
)
@click.option(
    "--mmproj",
    "mmprojs",
    multiple=True,
    type=click.Choice(["F32", "F16", "BF16", "Q8_0"], case_sensitive=False),
    help="Write the vision tower's file, too.",
)
@click.option("--drafter", metavar="MODEL", help="Write this drafter's Q8_0 file, too.")
@click.option("--plan", "plan_file", type=click.Path(), help="Cut on the way; heads may differ from layer to layer.")
@click.option("--heal", type=click.Path(), help="With --plan: a folder of gemcut heal, what it refitted goes in.")
@click.option(
    "--pad-experts",
    is_flag=True,
    help="Experts as wide as blocks of 256, by zeros: smaller types fit. Pays below 3.5 bits a weight, costs above 4.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads that quantise; by default one for each core.")
@click.option("--max-shard-size", type=ByteSize(), help="Split files into parts of at most this, as 2GiB or 4GB.")
@options.force
@options.dry_run
@options.talk
def gguf(
    model: str,
    types: tuple[str, ...],
    sizes: tuple[int, ...],
    fit: int | None,
    context: int,
    kv: str,
    beside: str,
    curvature: str | None,
    out: str,
    imatrix: str | None,
    overrides: tuple[str, ...],
    override_files: tuple[str, ...],
    mmprojs: tuple[str, ...],
    drafter: str | None,
    plan_file: str | None,
    heal: str | None,
    pad_experts: bool,
    threads: int | None,
    max_shard_size: int | None,
    force: bool,
    dry_run: bool,
    talk: Talk,
) -> None:
    """Write GGUF files straight from safetensors, many types from one read.

    Finished tensors of a run that broke off stay; tensors that an earlier export in the folder holds are copied. --size
    and --fit measure what every type of every tensor costs, once; that and a picture of the bits stay in the folder.
    Where nothing was measured, a dry run measures as long, and keeps nothing.

    Tensors have the bytes that llama-quantize gives them, but for importance matrices with roundings (gemcut imatrix
    --variant auto, or --roundings): blocks are then picked from several quantisations, which llama-quantize does not.

    An NVFP4 folder is stored without rounding: -t NVFP4 takes codes and scales as they are, -t BF16 what they mean.
    """
    from gemcut import exporting, gguf_stages, machine, mixing, models, recipe
    from gemcut.errors import UsageError
    from gemcut.export.mix.overrides import read_overrides

    if not (types or sizes or fit or mmprojs or drafter):
        raise UsageError("no file type was asked for", hint="-t Q4_K_M -t IQ3_M, --size 10GiB, or --fit 24GiB")
    if not fit:
        options.refuse("context", "kv", "beside", wanted="--fit SIZE")
    if not (fit or sizes):
        options.refuse("curvature", wanted="--size or --fit")
    base = models.open_exportable(model)
    if heal and not plan_file:
        raise UsageError("--heal goes with the --plan that it refitted")
    if plan_file:
        base = exporting.after_plan(base, Path(plan_file), Path(heal) if heal else None)
    threads = threads or machine.cores()
    others: list[Json] = [one.strip() for one in beside.split(",") if one.strip()]
    card: dict[str, Json] = {"memory": str(fit), "context": context, "kv": kv, "beside": others}
    words = recipe.gguf_words(
        {
            "tiers": list(types),
            "sizes": [str(one) for one in sizes],
            "fit": [card] if fit else [],
            "overrides": [
                *overrides,
                *(line for one in override_files for line in read_overrides(Path(one))),
            ],
            "mmproj": [one.upper() for one in mmprojs],
            "drafter": {"model": drafter} if drafter else None,
            "max_shard_size": str(max_shard_size) if max_shard_size else None,
            "pad_experts": pad_experts,
            "threads": threads,
        }
    )
    exports = gguf_stages.plan_files(
        base,
        words,
        imatrix=Path(imatrix) if imatrix else None,
        curvature=Path(curvature) if curvature else None,
        damages=Path(out) / mixing.DAMAGES_FILE,
        keep=not dry_run,
        progress=talk.progress,
    )
    mixes = [mix for export in exports for mix in export.mixes]
    for one in mixes:
        _show_mix(talk, one)
    found = exporting.estimate(exports, Path(out), threads, force=force)
    if dry_run:
        _show_preflight(talk, found)
        return
    for export in exports:
        for why, count in Counter(export.layout.left_out.values()).items():
            what = "1 tensor is" if count == 1 else f"{count} tensors are"
            talk.say(f"{what} not in {export.planned[0].target.name}: {why}")
    reports = gguf_stages.write_files(exports, words, Path(out), force=force, progress=talk.progress)
    _show(talk, reports, mixes, out)


def _show_preflight(talk: Talk, found: GgufPreflight) -> None:
    for file in found.files if len(found.files) == 1 or talk.verbose else ():
        talk.table(
            file.name,
            ("tensors", "number", "types", "size", "bits per weight"),
            _kind_rows(file.kinds, every=talk.verbose > 0),
        )
    talk.table(
        "Dry run: nothing was written",
        ("file", "parts", "bytes", "size", "bits per weight"),
        [(f.name, f.parts, f.size_bytes, size(f.size_bytes), f"{f.bits_per_weight:.3f}") for f in found.files],
        note=(
            f"reads {size(found.read_bytes)} with {found.threads} threads; disk: {size(found.write_bytes)} needed, "
            f"{size(found.free_bytes)} free; memory: {size(found.memory_bytes)} needed, "
            f"{size(found.available_bytes)} available"
        ),
    )
    talk.result(found, text="")


def _kind_rows(kinds: Sequence[KindSize], *, every: bool) -> list[tuple[object, ...]]:
    """A row for each role; one for all that stay float32 beside others, if not `every`."""
    plain = [kind for kind in kinds if {one.name for one in kind.types} == {"F32"}]
    if every or len(plain) in (1, len(kinds)):
        plain = []
    rows: list[tuple[object, ...]] = [
        (
            kind.role,
            kind.tensors,
            ", ".join(t.name for t in kind.types),
            size(kind.size_bytes),
            f"{kind.bpw:.2f}",
        )
        for kind in kinds
        if kind not in plain
    ]
    if plain:
        what = f"{len(plain)} kinds of norms, scales, …"
        rows.append((what, sum(k.tensors for k in plain), "F32", size(sum(k.size_bytes for k in plain)), "32.00"))
    return rows


def _show_mix(talk: Talk, mix: Mix) -> None:
    """Where the memory goes, and which types the tensors got for what price."""
    found = mix.solution
    if mix.fit is not None:
        rows = [(term.name, size(term.size_bytes), term.how) for term in mix.fit.terms]
        rows.append(("weights", size(mix.fit.weights_bytes), "what is left"))
        talk.table(f"A card of {size(mix.fit.memory_bytes)}", ("part", "size", "how"), rows)
    talk.table(
        f"{mix.name}: {found.size_bytes:,} of {found.budget_bytes:,} bytes, {found.damage:.5f} nats expected",
        ("tensors", "layers", "types", "size", "bits per weight", "nats"),
        [
            (
                band.role,
                "" if band.layers is None else f"{band.layers[0]}-{band.layers[1]}",
                ", ".join(f"{kind.name} {count}" for kind, count in band.types),
                size(band.size_bytes),
                f"{band.bpw:.2f}",
                f"{band.damage:.5f}",
            )
            for band in mix.bands
        ],
        note=f"files of these types weigh {size(found.least_bytes)} to {size(found.most_bytes)}; "
        + (
            "every tensor has its best type, so the file is smaller than asked"
            if found.size_bytes == found.most_bytes < found.budget_bytes
            else f"the next MiB would save {found.price * 2**20:.2g} nats"
        ),
    )


def _show(talk: Talk, reports: tuple[ExportReport, ...], mixes: Sequence[Mix], out: str) -> None:
    talk.table(
        "Written",
        ("file", "bytes", "size", "bits per weight", "types", "quantised", "copied", "resumed"),
        [
            (
                f.name if len(f.parts) == 1 else f"{f.name} in {len(f.parts)} parts",
                f.size_bytes,
                size(f.size_bytes),
                f"{f.bits_per_weight:.3f}",
                ", ".join(f"{kind} {count}" for kind, count in f.types.items()),
                "there already" if f.found else f.quantised,
                f.copied,
                f.resumed,
            )
            for report in reports
            for f in report.files
        ],
        note="; ".join(
            f"{size(r.read_bytes)} read in {duration(r.seconds)}; "
            f"{'1 thread was' if r.threads == 1 else f'{r.threads} threads were'} "
            f"{duration(r.kernel_seconds)} in the quantisers" for r in reports
        ),
    )  # fmt: skip
    talk.result({"reports": reports, "mixes": [mix.summary() for mix in mixes]}, path=out, text=out)
