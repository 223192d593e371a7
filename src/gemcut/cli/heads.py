"""`ablate` and `heal`: what the loss says about attention heads, and the refit of what is left after a cut."""

from __future__ import annotations

from pathlib import Path

import click

from gemcut.cli import options
from gemcut.cli.console import Talk


@click.command()
@click.argument("model")
@click.option("--corpus", required=True, help="JSON lines, text, or demo:calibration.")
@click.option("--method", type=click.Choice(["loo", "taylor"]), required=True, help="Leave one out, or the gradient.")
@options.out_folder
@options.max_tokens
@click.option("--max-tokens-per-item", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="float32", show_default=True)
@options.device
@options.force
@options.talk
def ablate(
    model: str,
    corpus: str,
    method: str,
    out: str,
    max_tokens: int | None,
    max_tokens_per_item: int,
    dtype: str,
    device: str,
    force: bool,
    talk: Talk,
) -> None:
    """What the loss says about every attention head, one layer in memory."""
    from gemcut import head_stages, models, stages

    base = models.open_model(model)
    text = stages.read_corpus(corpus, base, max_tokens, max_tokens_per_item)
    talk.say(f"{base.name}: {len(text.items)} items, {text.tokens:,} tokens")
    found = head_stages.importance(
        base, text, method, Path(out), dtype=dtype, device=device, force=force, progress=talk.progress
    )
    worst = [sorted(range(len(row)), key=row.tolist().__getitem__) for row in found.values]
    talk.table(
        f"{method}: nats per token, {found.tokens:,} predicted tokens of {found.items} items",
        ("layer", "least missed heads", "most missed heads", "least", "most"),
        [
            (
                layer,
                " ".join(map(str, order[:4])),
                " ".join(map(str, order[::-1][:4])),
                f"{row.min():+.2e}",
                f"{row.max():+.2e}",
            )
            for layer, order, row in zip(found.layers, worst, found.values, strict=True)
        ],
    )
    talk.result(
        {"method": method, "layers": list(found.layers), "values": found.values.tolist(), "tokens": found.tokens},
        path=out,
        text=out,
    )


@click.command()
@click.argument("model")
@click.option("--plan", "plan_file", required=True, type=click.Path(), help="plan.json: which heads or experts stay.")
@click.option("--corpus", required=True, help="JSON lines, text, or demo:calibration.")
@options.out_folder
@options.max_tokens
@click.option("--method", type=click.Choice(["sequential", "local"]), default="sequential", show_default=True)
@options.device
@click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Another heal field, e.g. dtype=float32.")
@options.force
@options.talk
def heal(
    model: str,
    plan_file: str,
    corpus: str,
    out: str,
    max_tokens: int | None,
    method: str,
    device: str,
    sets: tuple[str, ...],
    force: bool,
    talk: Talk,
) -> None:
    """Refit what a cut of heads or experts leaves, towards the original; resumes by layer.

    Behind dropped heads the output projections, behind dropped experts the scales of those that stay. A layer whose
    heal does not beat the cut without it on held-out items keeps its old weights.
    """
    from gemcut import head_stages, models, recipe, records, stages

    words = recipe.heal_words({"corpus": corpus, "max_tokens": max_tokens, "method": method, "device": device}, sets)
    base = models.open_model(model)
    text = stages.corpus_of(words, base)
    plan = records.load_plan(Path(plan_file))
    report = head_stages.heal(base, plan, text, words, Path(out), force=force, progress=talk.progress)
    what = "what the attention adds to the stream" if plan.kind == "heads" else "the experts' sum"
    talk.table(
        f"Residual of {what}, relative, "
        f"{report.tokens:,} tokens, "
        f"{report.held_out_items} of {report.items} items held out",
        ("layer", "dropped", "samples", "ridge", "condition", "held out, no heal", "held out, healed", "fit", "used"),
        [
            (
                one.layer,
                " ".join(map(str, one.dropped)),
                f"{one.samples:,}",
                f"{one.ridge:g}",
                f"{one.condition:.2g}",
                f"{one.held_out_before:.4f}",
                f"{one.held_out_after:.4f}",
                f"{one.fit_after:.4f}",
                "yes" if one.used else "no",
            )
            for one in report.layers
        ],
    )
    talk.result(report, path=out, text=out)
