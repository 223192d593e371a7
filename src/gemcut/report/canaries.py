"""What a canary found: one check, and a table by condition."""

from __future__ import annotations

from gemcut.records.canary import CanaryResult, condition_name
from gemcut.report.data import Check, Extra, Table
from gemcut.types import Estimate


def canary_checks(canary: CanaryResult | None) -> tuple[Check, ...]:
    """The verdict in one line."""
    if canary is None:
        return ()
    worst = max((c.nll_ratio.value for c in canary.conditions if c.nll_ratio is not None), default=1.0)
    text = f"{len(canary.conditions)} conditions, {canary.conditions[0].prompts} prompts each; largest NLL ratio "
    return (Check("canary: it still talks", canary.passed, f"{text}{worst:.3f}"),)


def canary_tables(canary: CanaryResult | None) -> tuple[Extra, ...]:
    """One row per condition."""
    if canary is None:
        return ()
    rows = tuple(
        (
            condition_name(c.style, c.bos),
            _share(c.base_broken),
            _share(c.candidate_broken),
            _share(c.newly_broken),
            f"{c.identical} of {c.prompts}",
            "–" if c.nll_ratio is None else f"{c.nll_ratio.value:.3f} [{c.nll_ratio.low:.3f}, {c.nll_ratio.high:.3f}]",
            "failed" if c.reasons else "passed",
        )
        for c in canary.conditions
    )
    columns = ("Condition", "Base broken", "Broken", "Newly broken", "Same answer", "NLL ratio", "")
    n = canary.conditions[0].prompts if canary.conditions else 0
    text = (
        f"Greedy answers to n = {n} prompts a condition, base and this model. Broken: a loop, repetition, a foreign "
        "script, a leaked marker, or nothing. NLL ratio: what the base's own answers cost this model, against the base."
    )
    return (Extra("Canary", text, Table(columns, rows, "lrrrrrl")),)


def _share(value: Estimate) -> str:
    return f"{100 * value.value:.0f} % [{100 * value.low:.0f}, {100 * value.high:.0f}]"
