"""`gemcut kld`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from gemcut.cli import options
from gemcut.cli.console import Talk
from gemcut.types import Estimate, KldResult


@click.command()
@click.argument("base")
@click.argument("candidates", nargs=-1, required=True)
@click.option("--corpus", required=True, help="JSON lines, text, or demo:heldout.")
@options.max_tokens
@options.device
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--raw", is_flag=True, help="Messages as plain text, without the chat template.")
@click.option("--tokenizer", metavar="FOLDER", help="Whose token ids, where only GGUF files are compared.")
@click.option(
    "--floor",
    is_flag=True,
    help="Also the base itself as a BF16 GGUF, written to -o or beside the first candidate and deleted: what other "
    "arithmetic does.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of llama.cpp; by default the cores that are free.")
@click.option("-o", "--out", type=click.Path(), help="Keep the results in this folder.")
@options.talk
def kld(
    base: str,
    candidates: tuple[str, ...],
    corpus: str,
    max_tokens: int | None,
    device: str,
    dtype: str,
    seed: int,
    raw: bool,
    tokenizer: str | None,
    floor: bool,
    threads: int | None,
    out: str | None,
    talk: Talk,
) -> None:
    """KL divergence of candidates from a base, streamed, no logits on disk.

    BASE and each CANDIDATE are checkpoint folders or GGUF files; llama.cpp runs the latter. NVFP4 folders run as they
    are, in either layout, with their activations and caches rounded where they say so. Token ids are made once, by the
    base's own tokenizer, and both sides get the same.
    """
    import contextlib

    from gemcut import comparing, recipe

    words = recipe.measure_words(
        {"corpus": corpus, "max_tokens": max_tokens, "device": device, "dtype": dtype, "seed": seed}
    )
    folder = Path(out) if out else None
    with contextlib.ExitStack() as stack:
        compared = comparing.open_comparison(base, candidates, tokenizer)
        text = comparing.corpus_for(compared, words, raw=raw)
        if floor:
            scratch = folder or Path(candidates[0]).resolve().parent  # a whole model may not fit where /tmp lies
            compared = stack.enter_context(comparing.with_floor(compared, scratch, progress=talk.progress))
        results = comparing.measure(compared, text, words, folder, threads=threads, progress=talk.progress)
    show_kld(talk, results)
    if compared.wants_floor:
        talk.say("part of this is the arithmetic of llama.cpp and no loss of bits: --floor measures how much")
    talk.result({"results": list(results.values())}, path=out, text=out or "")


def show_kld(talk: Talk, results: Mapping[str, KldResult], title: str = "KL(base ‖ candidate)") -> None:
    """One row per candidate and class; the rows of one candidate only when there are several candidates."""
    several = len(results) > 1
    rows = []
    for name, result in results.items():
        for row in result.rows:
            if several and row.cls != "all":
                continue
            rows.append(
                (
                    name if several else row.cls,
                    row.tokens,
                    row.mean.n,
                    _nats(row.mean),
                    _nats(row.median),
                    _nats(row.p99),
                    _shown(row.same_top, 100, 1, " %"),
                    _nats(row.ln_ppl_ratio),
                )
            )
    talk.table(
        title,
        ("candidate" if several else "class", "tokens", "n", "mean nats", "median", "p99", "same top", "ln PPL ratio"),
        rows,
        note="95 % intervals, bootstrap over n chunks",
    )


def _nats(value: Estimate) -> str:
    return _shown(value, 1, 4 if abs(value.value) >= 0.01 else 6)  # a good GGUF is at 0.0001 nats


def _shown(value: Estimate, scale: float, digits: int, unit: str = "") -> str:
    """With its interval; one chunk alone has none."""
    number, low, high = (f"{scale * one:.{digits}f}" for one in (value.value, value.low, value.high))
    return f"{number}{unit}" + (f" [{low}, {high}]" if value.n > 1 else "")
