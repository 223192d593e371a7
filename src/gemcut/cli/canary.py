"""`gemcut canary`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemcut.cli import options
from gemcut.cli.console import Talk

if TYPE_CHECKING:
    from gemcut.records.canary import CanaryResult, ConditionVerdict
    from gemcut.types import Estimate

_SHOWN = 90  # characters of an answer in the table


@click.command()
@click.argument("base")
@click.argument("candidate")
@click.option("--base-answers", type=click.Path(), help="Keep the base's answers here; read them where they exist.")
@click.option("--max-new-tokens", type=click.IntRange(min=4), default=48, show_default=True, help="Cut answers there.")
@options.device
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--max-memory", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="Refuse beyond this.")
@click.option("-o", "--out", type=click.Path(), help="Keep the record in this folder.")
@options.talk
def canary(
    base: str,
    candidate: str,
    base_answers: str | None,
    max_new_tokens: int,
    device: str,
    dtype: str,
    max_memory: float | None,
    out: str | None,
    talk: Talk,
) -> None:
    """Does the model still talk? Greedy answers of base and candidate, held side by side.

    24 fixed prompts, raw, as chat and as chat with thinking, each with one BOS and with none. Looks for loops,
    repetition, foreign scripts, leaked markers, empty and endless answers, and measures the NLL of known-good answers.
    A finding counts where the base does not show it. Exit code 5 when the candidate fails; the record is kept.
    """
    from gemcut import models
    from gemcut.canary import CanarySettings, refuse_failed, run_canary

    settings = CanarySettings(
        max_new_tokens=max_new_tokens,
        dtype=None if dtype == "auto" else dtype,
        device=device,
        max_memory=None if max_memory is None else int(max_memory * 2**30),
    )
    result = run_canary(
        models.open_model(base),
        models.open_model(candidate),
        settings,
        Path(out) if out else None,
        talk.progress,
        base_answers=Path(base_answers) if base_answers else None,
    )
    show_canary(talk, result)
    talk.result(result, path=out, text=out or "")
    refuse_failed(result)


def show_canary(talk: Talk, result: CanaryResult) -> None:
    """One row per condition, then the three answers that suffered most."""
    from gemcut.canary import worst
    from gemcut.records.canary import condition_name

    n = result.conditions[0].prompts if result.conditions else 0
    talk.table(
        f"Canary: {result.candidate} against {result.base}, {'passed' if result.passed else 'FAILED'}",
        ("condition", "base broken", "broken", "newly broken", "mended", "same answer", "differs at", "NLL ratio", ""),
        [
            (
                condition_name(c.style, c.bos),
                round(c.base_broken.value * c.prompts),
                round(c.candidate_broken.value * c.prompts),
                _share(c.newly_broken),
                c.mended,
                f"{c.identical} of {c.prompts}",
                "–" if c.median_divergence is None else f"{c.median_divergence:g}",
                _ratio(c),
                _word(c),
            )
            for c in result.conditions
        ],
        note=f"n = {n} prompts a condition; 95 % intervals; median token of the first difference"
        + "".join(f"; {name} left out: {why}" for name, why in result.skipped.items()),
    )
    rows = worst(result)
    if rows:
        talk.table(
            "Where they differ most",
            ("prompt", "new", "base", "candidate"),
            [
                (
                    f"{row.prompt} ({condition_name(row.style, row.bos)})",
                    ", ".join(row.new) or "–",
                    _shown(row.base_text),
                    _shown(row.candidate_text),
                )
                for row in rows
            ],
        )


def _share(value: Estimate) -> str:
    return f"{100 * value.value:.0f} % [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def _ratio(c: ConditionVerdict) -> str:
    return "–" if c.nll_ratio is None else f"{c.nll_ratio.value:.3f} [{c.nll_ratio.low:.3f}, {c.nll_ratio.high:.3f}]"


def _word(c: ConditionVerdict) -> str:
    if c.reasons:
        return "FAILED"
    return "passed" if c.base_sound else "base broken"


def _shown(text: str) -> str:
    """One line, so long as a table bears; what cannot be seen is spelled."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
