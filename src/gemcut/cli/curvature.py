"""`gemcut curvature`."""

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
@click.option("--max-tokens-per-item", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--draws", type=click.IntRange(min=1), default=1, show_default=True, help="Answers drawn for each token.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="float32", show_default=True)
@options.device
@options.force
@options.talk
def curvature(
    model: str,
    corpus: str,
    out: str,
    max_tokens: int | None,
    max_tokens_per_item: int,
    draws: int,
    seed: int,
    dtype: str,
    device: str,
    force: bool,
    talk: Talk,
) -> None:
    """What a change of each weight does to the answers; gguf --size solves by it.

    Forward and backward through the model once, one layer in memory; ten to fifty thousand tokens are enough.
    """
    from gemcut import gguf_stages, models, recipe, stages, store

    base = models.open_model(model)
    store.refuse_existing(Path(out), force=force)
    text = stages.read_corpus(corpus, base, max_tokens, max_tokens_per_item)
    talk.say(f"{base.name}: {len(text.items)} items, {text.tokens:,} tokens")
    words = recipe.curvature_words({"draws": draws, "seed": seed, "dtype": dtype, "device": device})
    found = gguf_stages.curvature(base, text, words, Path(out), force=force, progress=talk.progress)
    talk.result(
        found,
        path=out,
        text=f"{out}: {found['tensors']} tensors, {found['tokens']:,} predictions of {found['items']} items",
    )
