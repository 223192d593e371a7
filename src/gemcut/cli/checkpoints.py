"""Verbs on checkpoints and GGUF files that need no torch: `inspect`, `cut`, `verify`, `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemcut.cli import options
from gemcut.cli.console import Talk
from gemcut.cli.sizes import size

if TYPE_CHECKING:
    from gemcut.nvfp4.describe import Quantised
    from gemcut.types import Manifest


_any_parent = click.option(
    "--any-parent", is_flag=True, help="Cut a GGUF file that does not say from which model it was made."
)


@click.command()
@click.argument("model")
@options.talk
def inspect(model: str, talk: Talk) -> None:
    """What a checkpoint is, its sizes, what can be cut. Headers only."""
    from gemcut import models

    found = models.inspection(model)
    quantised = found.quantised
    kind = ", ".join(found.bytes_by_dtype) if quantised is None else f"{quantised.scheme}, {quantised.layout} layout"
    talk.table(
        f"{found.name}: {found.architecture} ({found.family}), {kind}",
        ("component", "tensors", "parameters", "size", "share"),
        [
            (
                c.name,
                c.tensors,
                c.parameters,
                size(c.size_bytes),
                f"{100 * c.size_bytes / max(found.size_bytes, 1):.1f} %",
            )
            for c in found.components
        ],
        note=f"{found.parameters:,} parameters in {found.tensors} tensors, {size(found.size_bytes)} in "
        f"{found.shards} shards"
        + (f"; {found.experts_per_token} experts a token" if found.experts_per_token else "; dense")
        + ("" if quantised is None else _quantised(quantised)),
    )
    if found.cuttable:
        talk.table(
            "What can be cut",
            ("kind", "layers", "units per layer", "bytes per unit, all layers", "can go"),
            [
                (c.kind, len(c.layers), c.units, size(c.size_bytes_per_unit), f"down to {c.minimum}")
                for c in found.cuttable
            ],
        )
    talk.result(found, path=found.name, text="")


def _quantised(found: Quantised) -> str:
    four = "weights" if found.scheme == "NVFP4A16" else "weights and activations"
    return f"; {found.linears} linears with {four} in NVFP4 ({', '.join(found.parts)})" + (
        "; FP8 cache" if found.fp8_cache else ""
    )


@click.command()
@click.argument("model")
@click.option("--plan", "plan_file", required=True, type=click.Path(), help="plan.json: which units stay.")
@click.option("--heal", type=click.Path(), help="A folder of gemcut heal: what it refitted goes into the cut.")
@click.option(
    "-o", "--out", required=True, type=options.OutPath(), help="The folder to write; of a GGUF file, the file."
)
@click.option("--copy", is_flag=True, help="Copy unchanged shards instead of hard-linking them.")
@_any_parent
@options.force
@options.dry_run
@options.talk
def cut(
    model: str,
    plan_file: str,
    heal: str | None,
    out: str,
    copy: bool,
    any_parent: bool,
    force: bool,
    dry_run: bool,
    talk: Talk,
) -> None:
    """Write the smaller checkpoint, its manifest and SHA256SUMS.

    MODEL may be a GGUF file: its blocks are copied, not quantised anew, and OUT.manifest.json lies beside the new one.
    """
    from gemcut import models, stages

    if models.is_gguf(model):
        if heal or copy:
            raise _only_folders("--heal" if heal else "--copy")
        _cut_gguf(Path(model), Path(plan_file), Path(out), any_parent, force, dry_run, talk)
        return
    if any_parent:
        raise _only_files()
    base = models.open_model(model)
    if dry_run:
        from gemcut import preflight
        from gemcut.cli.sizes import show_preflight

        show_preflight(talk, preflight.estimate_cut(base, Path(plan_file), Path(out)))
        return
    healed = Path(heal) if heal else None
    manifest = stages.cut(
        base, Path(plan_file), Path(out), healed=healed, link=not copy, force=force, progress=talk.progress
    )
    _show_cut(manifest, out, talk)


def _cut_gguf(
    model: Path, plan_file: Path, out: Path, any_parent: bool, force: bool, dry_run: bool, talk: Talk
) -> None:
    from gemcut import gguf_cutting, surgery

    meant = gguf_cutting.open_cut(model, plan_file, out, any_parent=any_parent)
    if dry_run:
        found = gguf_cutting.estimate(meant, out)
        talk.result(
            found,
            path=str(out),
            text=f"{out}: {size(found.size_bytes_before)} → {size(found.size_bytes_after)}, {found.tensors} of "
            f"{len(meant.layout.tensors)} tensors would change, {size(found.free_bytes)} free; nothing was written",
        )
        return
    _show_cut(surgery.write_gguf_cut(meant, out, force=force, progress=talk.progress), str(out), talk)


def _show_cut(manifest: Manifest, out: str, talk: Talk) -> None:
    changed = [fact for fact in manifest.tensors if fact.found != "same"]
    talk.result(
        manifest,
        path=out,
        text=f"{out}: {size(manifest.size_bytes_before)} → {size(manifest.size_bytes_after)}, "
        f"{len(changed)} of {len(manifest.tensors)} tensors changed",
    )


def _only_folders(flag: str) -> Exception:
    from gemcut.errors import UsageError

    return UsageError(
        f"{flag} goes with a checkpoint folder, not with a GGUF file",
        hint="cut the folder, and export that: gemcut gguf MODEL --plan",
    )


def _only_files() -> Exception:
    from gemcut.errors import UsageError

    return UsageError("--any-parent goes with a GGUF file", hint="a folder says itself which checkpoint it is")


@click.command()
@click.argument("model")
@click.option("--base", required=True, help="The checkpoint it was cut from.")
@click.option("--plan", "plan_file", type=click.Path(), help="Hold the bytes against this plan, too.")
@click.option("--heal", type=click.Path(), help="And against this heal.")
@_any_parent
@options.talk
def verify(model: str, base: str, plan_file: str | None, heal: str | None, any_parent: bool, talk: Talk) -> None:
    """Hold the bytes of a cut checkpoint, or of two GGUF files, against plan and manifest.

    An NVFP4 folder is held against the model that it was quantised from, number by number.

    Exit code 4 and the names of the tensors when intent and bytes disagree.
    """
    from gemcut import models, stages

    if models.is_gguf(model) or models.is_gguf(base):
        if heal or not (models.is_gguf(model) and models.is_gguf(base)):
            raise _only_folders("--heal" if heal else "--base")
        _verify_gguf(Path(model), Path(base), Path(plan_file) if plan_file else None, any_parent, talk)
        return
    if any_parent:
        raise _only_files()
    from gemcut.cli import nvfp4

    if (quantised := nvfp4.nvfp4_folder(model)) is not None:
        options.refuse("plan_file", "heal", wanted="an NVFP4 folder and its base")
        nvfp4.verify_folder(quantised, base, talk)
        return
    report = stages.verify_cut(
        Path(model),
        models.open_model(base),
        Path(plan_file) if plan_file else None,
        healed=Path(heal) if heal else None,
        progress=talk.progress,
    )
    checks = stages.checks(report)
    talk.table("Verified", ("check", "", ""), [(c.name, "passed" if c.passed else "FAILED", c.detail) for c in checks])
    talk.result(report, path=model, text="")


def _verify_gguf(model: Path, base: Path, plan_file: Path | None, any_parent: bool, talk: Talk) -> None:
    from gemcut import gguf_cutting

    found = gguf_cutting.verify(model, base, plan_file, any_parent=any_parent, progress=talk.progress)
    changed = [fact for fact in found.manifest.tensors if fact.found != "same"]
    rows = [("tensors that changed", f"{len(changed)} of {len(found.manifest.tensors)}")]
    rows += [("bytes are what the plan asks for", "every kept unit, and nothing else")] if found.plan_checked else []
    rows += [("manifest", f"{len(found.manifest.files)} files hashed again")] if found.record_checked else []
    talk.table("Verified", ("check", "", ""), [(name, "passed", detail) for name, detail in rows])
    talk.result(found, path=str(model), text="")


@click.command()
@click.argument("a")
@click.argument("b")
@options.talk
def diff(a: str, b: str, talk: Talk) -> None:
    """Tensor by tensor between two checkpoints or two GGUF files, or drop by drop between two plans."""
    if a.endswith(".json") and b.endswith(".json"):
        _diff_plans(Path(a), Path(b), talk)
        return
    from gemcut import models

    manifest = models.diff(a, b, progress=talk.progress)
    changed = [fact for fact in manifest.tensors if fact.found != "same"]
    talk.table(
        f"{len(changed)} of {len(manifest.tensors)} tensors differ",
        ("tensor", "type", "found", "before", "after", "relative change"),
        [
            (
                fact.name,
                fact.dtype,
                fact.found,
                "×".join(map(str, fact.shape_before)) if fact.shape_before is not None else "",
                "×".join(map(str, fact.shape_after)) if fact.shape_after is not None else "",
                "" if fact.relative_change is None else f"{fact.relative_change:.3g}",
            )
            for fact in changed
        ],
    )
    if manifest.config_changes:
        talk.table(
            "metadata" if models.is_gguf(b) else "config.json",
            ("key", "before", "after"),
            [(key, str(before), str(after)) for key, (before, after) in manifest.config_changes.items()],
        )
    talk.result(manifest, path=b, text="")


def _diff_plans(a: Path, b: Path, talk: Talk) -> None:
    from gemcut import stages

    found = stages.diff_plans(a, b)
    talk.table(
        f"{100 * found.overlap:.1f} % of the drops are shared ({found.drops_a} and {found.drops_b} drops; "
        f"{100 * found.expected:.1f} ± {100 * found.expected_sd:.1f} % expected at random)",
        ("layer", "only in the first", "only in the second"),
        [
            (layer.layer, " ".join(map(str, layer.only_a)), " ".join(map(str, layer.only_b)))
            for layer in found.layers
            if layer.only_a or layer.only_b
        ],
    )
    talk.result(found, path=b, text="")
