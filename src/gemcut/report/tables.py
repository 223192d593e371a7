"""Rows for people: pure functions from flow types to text. The page, the card and the command line all use them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gemcut.report.data import ALL, KldEntry, ReportData, Table
from gemcut.report.grids import NEAR_TIE, cut_grid
from gemcut.report.quants import quants_figures, quants_headline
from gemcut.report.spelling import change, count, interval, parameters, size, wilson
from gemcut.types import Estimate

UNIT_NAMES = {"experts": ("expert", "experts"), "heads": ("query head", "query heads")}


def units_name(data: ReportData, number: int = 2) -> str:
    """`expert`, `experts`, `query head` or `query heads`."""
    return UNIT_NAMES[data.kind][number != 1]


def kept_text(data: ReportData) -> str | None:
    """`24 of 32 experts in each of 12 layers`, or with a range where layers differ. None when nothing was cut."""
    if data.plan is None or not data.layers:
        return None
    kept = [len(data.plan.layers[layer].keep) for layer in data.layers]
    number = str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)}–{max(kept)}"
    layers = f"each of {len(kept)} layers" if len(kept) > 1 else f"layer {data.layers[0]}"
    return f"{number} of {data.plan.units} {units_name(data)} in {layers}"


def headline(data: ReportData) -> str:
    """The main result in one sentence: what stayed, what was saved, and what it cost with n and interval."""
    if data.quants is not None and data.only_quants:
        return quants_headline(data.quants)
    before, after = data.base.size_bytes, data.candidate.size_bytes
    kept = kept_text(data)
    saved = f"{size(after)} instead of {size(before)} ({change(before, after)})"
    if before == after:
        saved = f"{size(after)} as before"
    start = f"Kept {kept}: {saved}" if kept else f"{data.candidate.name}: {saved}"
    row = data.entry.row() if data.entry else None
    if row is None:
        return f"{start}. What it cost has not been measured."
    return (
        f"{start}, at a cost of {interval(row.mean)} nats per token (mean KLD, n = {count(row.mean.n)} chunks, "
        f"{count(row.tokens)} tokens); the most likely token stays the same at "
        f"{interval(row.same_top, scale=100)} % of positions."
    )


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One box of the strip under the headline."""

    label: str
    value: str
    note: str


def key_figures(data: ReportData) -> tuple[KeyFigure, ...]:
    """Size, parameters, what stayed, damage and the verdict of `verify`: those that are known."""
    if data.quants is not None and data.only_quants:
        return tuple(KeyFigure(*words) for words in quants_figures(data.quants))
    before, after = data.base, data.candidate
    figures = [
        KeyFigure(
            "Size on disk", size(after.size_bytes),
            f"{change(before.size_bytes, after.size_bytes)} of {size(before.size_bytes)}",
        ),
        KeyFigure(
            "Parameters", parameters(after.parameters),
            f"{change(before.parameters, after.parameters)} of {parameters(before.parameters)}",
        ),
    ]  # fmt: skip
    if data.plan is not None and data.layers:
        kept = sum(len(data.plan.layers[layer].keep) for layer in data.layers)
        total = data.plan.units * len(data.layers)
        figures.append(
            KeyFigure(
                f"{units_name(data).capitalize()} kept", f"{count(kept)} of {count(total)}", kept_text(data) or ""
            )
        )
    row = data.entry.row() if data.entry else None
    if row is not None:
        n = f"n = {count(row.mean.n)} chunks"
        figures += [
            KeyFigure("Mean KLD, nats per token", *_split(interval(row.mean), n)),
            KeyFigure("Same most likely token", *_split(interval(row.same_top, scale=100), n, " %")),
            KeyFigure("ln PPL ratio", *_split(interval(row.ln_ppl_ratio, sign=True), n)),
        ]
    if data.checks:
        passed = sum(check.passed for check in data.checks)
        good = passed == len(data.checks)
        figures.append(
            KeyFigure(
                "Verified against the bytes", "passed" if good else "FAILED", f"{passed} of {len(data.checks)} checks"
            )
        )
    return tuple(figures)


def _split(text: str, n: str, unit: str = "") -> tuple[str, str]:
    """Value and note of an estimate: the interval and n go to the note."""
    value, rest = text.split(" ", 1)
    return value + unit, f"{rest} · {n}"


def dropped_rows(data: ReportData) -> Table | None:
    """One row per layer: what goes, which of it is a near tie, and what a guard keeps. plan.json has every reason."""
    if data.plan is None or not data.layers:
        return None
    grid = cut_grid(data)
    rows = []
    for row, layer in enumerate(data.layers):
        plan = data.plan.layers[layer]
        tied = [unit for unit in sorted(plan.drop) if _is_tie(data, row, unit)]
        held = sorted(int(unit) for unit in grid.order[row][grid.state[row] >= 2]) if grid else []
        lists = (", ".join(map(str, units)) or "–" for units in (sorted(plan.drop), tied, held))
        rows.append((str(layer), str(len(plan.keep)), *lists))
    columns = ("Layer", "Kept", f"Dropped {units_name(data)}", "Near ties among them", "Kept only by a guard")
    return Table(columns, tuple(rows), "rrlll")


def _is_tie(data: ReportData, row: int, unit: int) -> bool:
    p = data.keep_probability
    return p is not None and NEAR_TIE[0] < float(p[row, unit]) < NEAR_TIE[1]


# ---------------------------------------------------------------- what it cost


def by_damage(entries: Iterable[KldEntry]) -> list[KldEntry]:
    """Entries that have a row for all classes, least damage first; the label breaks ties."""
    known = [(row.mean.value, entry.label, entry) for entry in entries if (row := entry.row()) is not None]
    return [entry for _, _, entry in sorted(known, key=lambda item: item[:2])]


def criteria_rows(data: ReportData) -> Table | None:
    """Every measured candidate, least damage first, with the chosen one marked."""
    entries = by_damage(data.kld)
    if not entries:
        return None
    rows = []
    for entry in entries:
        row = entry.row()
        assert row is not None  # by_damage leaves the others out
        rows.append(
            (
                entry.label + (" (base against itself)" if entry.is_noise_floor else ""),
                interval(row.mean),
                interval(row.p99),
                interval(row.same_top, scale=100),
                interval(row.ln_ppl_ratio, sign=True),
                f"{count(row.mean.n)}",
                entry.note or "–",
            )
        )
    columns = (
        "Candidate",
        "Mean KLD, nats",
        "99th percentile, nats",
        "Same top token, %",
        "ln PPL ratio",
        "n chunks",
        "Note",
    )
    chosen = entries.index(data.entry) if data.entry in entries else None
    table = Table(columns, tuple(rows), "lrrrrrl", chosen)
    if all(entry.note == "" for entry in entries):
        table = Table(columns[:-1], tuple(row[:-1] for row in rows), "lrrrrr", chosen)
    return table


def class_rows(data: ReportData) -> Table | None:
    """Damage of the chosen candidate per class, most damage first, all classes last."""
    if data.entry is None:
        return None
    ordered = sorted(data.entry.result.rows, key=lambda row: (row.cls == ALL, -row.mean.value, row.cls))
    rows = tuple(
        (
            "all classes" if row.cls == ALL else row.cls,
            interval(row.mean),
            interval(row.median),
            interval(row.p99),
            interval(row.same_top, scale=100),
            interval(row.ln_ppl_ratio, sign=True),
            count(row.mean.n),
            count(row.tokens),
        )
        for row in ordered
    )
    columns = ("Class", "Mean KLD, nats", "Median, nats", "99th percentile, nats", "Same top token, %", "ln PPL ratio")
    pooled = next((i for i, row in enumerate(ordered) if row.cls == ALL), None)
    return Table((*columns, "n chunks", "Tokens"), rows, "lrrrrrrr", pooled)


def doubt_rows(data: ReportData, limit: int = 12) -> Table | None:
    """The units whose fate the corpus decides least: keep probability nearest to one half, with its Wilson interval."""
    if data.keep_probability is None or data.plan is None or data.bootstrap_rounds <= 0:
        return None
    probability = data.keep_probability
    order = np.argsort(np.abs(probability - 0.5), axis=None, kind="stable")
    rows = []
    for flat in order[:limit]:
        row, unit = (int(v) for v in np.unravel_index(flat, probability.shape))
        value = float(probability[row, unit])
        if not NEAR_TIE[0] < value < NEAR_TIE[1]:
            break
        low, high = wilson(value, data.bootstrap_rounds)
        layer = data.plan.layers[data.layers[row]]
        fate = "kept" if unit in layer.keep else "dropped"
        if data.plan_scores is not None:
            values = data.plan_scores.values[row]
            rank = 1 + int((values > values[unit]).sum())
            fate += f", rank {rank} of {len(values)} by {data.plan.criterion}"
        elif layer.drop.get(unit):
            fate += f": {layer.drop[unit]}"
        share = interval(Estimate(value, low, high, data.bootstrap_rounds))
        rows.append((str(data.layers[row]), str(unit), share, fate))
    columns = (
        "Layer",
        units_name(data, 1).capitalize(),
        f"Keep probability (n = {data.bootstrap_rounds} resamplings)",
        "Fate",
    )
    return Table(columns, tuple(rows), "rrrl")


def near_ties(data: ReportData) -> int:
    """Units whose keep probability lies strictly between 5 % and 95 %."""
    p = data.keep_probability
    return 0 if p is None else int(((p > NEAR_TIE[0]) & (p < NEAR_TIE[1])).sum())
