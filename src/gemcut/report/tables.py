"""Rows for people: pure functions from flow types to text. The page, the card and the command line all use them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gemcut.report.data import ALL, KldEntry, ModelFacts, ReportData, Table
from gemcut.report.grids import NEAR_TIE, cut_grid
from gemcut.types import Estimate, Json, TensorFact

UNIT_NAMES = {"experts": ("expert", "experts"), "heads": ("query head", "query heads")}


# ---------------------------------------------------------------- numbers


def size(size_bytes: int) -> str:
    """Bytes in the binary unit that keeps one to four digits before the point: `10.17 GiB`, `23.4 MiB`, `512 B`."""
    value = float(abs(size_bytes))
    sign = "−" if size_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" else 2 if value < 100 else 1
    return f"{sign}{value:.{digits}f} {unit}"


def count(number: int) -> str:
    """A whole number with thousands separators."""
    return f"{number:,}"


def parameters(number: int) -> str:
    """A parameter count with three significant digits and its unit: `25.2 B`, `31.1 M`, `512`."""
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)


def change(before: int, after: int) -> str:
    """Relative change of an exact quantity: `−22.3 %`."""
    if before == 0:
        return "new" if after else "±0 %"
    percent = 100 * (after - before) / before
    return "±0 %" if after == before else signed(percent, 1) + " %"


def signed(value: float, digits: int) -> str:
    """A number with a true minus sign, or a plus."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return ("−" if value < 0 else "+") + text


def decimals(low: float, high: float, value: float) -> int:
    """Decimals that show the half width of an interval with one digit, two where that digit is 1."""
    half = (high - low) / 2
    if half <= 0 or not math.isfinite(half):
        half = abs(value) / 1000 or 1e-3
    exponent = math.floor(math.log10(half))
    leading = half / 10**exponent
    return min(12, max(0, -exponent + (1 if leading < 2 else 0)))


def interval(estimate: Estimate, *, scale: float = 1.0, sign: bool = False) -> str:
    """`0.031 [0.028, 0.034]`: an estimate and its 95 % interval, without the n that the column or caption states."""
    if estimate.value == estimate.low == estimate.high == 0:
        return "0 [0, 0]"
    digits = decimals(estimate.low * scale, estimate.high * scale, estimate.value * scale)

    def number(value: float) -> str:
        value *= scale
        text = f"{abs(value):.{digits}f}"
        if sign:
            return signed(value, digits)
        return ("−" if value < 0 and float(text) != 0 else "") + text

    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def estimate(value: Estimate, units: str, *, scale: float = 1.0, sign: bool = False) -> str:
    """`0.031 [0.028, 0.034] (n = 240 chunks)`."""
    return f"{interval(value, scale=scale, sign=sign)} (n = {count(value.n)} {units})"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson interval of a share of n trials. Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209."""
    if n <= 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def json_text(value: Json) -> str:
    """A recipe or config value in one line."""
    if isinstance(value, dict):
        pairs = (
            (key, f"({json_text(item)})" if isinstance(item, dict) else json_text(item)) for key, item in value.items()
        )
        return ", ".join(f"{key} = {text}" for key, text in pairs) or "none"
    if isinstance(value, list):
        text = ", ".join(json_text(item) for item in value[:12])
        return f"[{text}{', …' if len(value) > 12 else ''}]"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- what was cut


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


def change_rows(data: ReportData) -> Table | None:
    """What the manifest found, grouped by tensor kind (layer numbers are `*`), with the layers that changed and the
    layers whose tensor of this kind has the base's bytes."""
    if data.manifest is None:
        return None
    groups: dict[tuple[str, str], list[TensorFact]] = {}
    same: dict[str, list[int]] = {}
    for fact in data.manifest.tensors:
        pattern = ".".join("*" if part.isdigit() else part for part in fact.name.split("."))
        if fact.found == "same":
            same.setdefault(pattern, []).extend(_layer_of(fact.name))
            continue
        groups.setdefault((pattern, fact.found), []).append(fact)
    rows = []
    for (pattern, found), facts in groups.items():
        known = [fact.relative_change for fact in facts if fact.relative_change is not None]
        change = f"{min(known):.2g} – {max(known):.2g}" if known else "–"
        layers = [layer for fact in facts for layer in _layer_of(fact.name)]
        before, after = (
            _shapes(shapes) for shapes in zip(*((f.shape_before, f.shape_after) for f in facts), strict=True)
        )
        rows.append((pattern, spans(layers), spans(same.get(pattern, [])), found, before, after, change))
    columns = ("Tensors", "Layers changed", "Unchanged", "Found", "Shape before", "Shape after", "Relative change")
    return Table(columns, tuple(rows), "lrrlrrr")


def _shapes(found: Iterable[tuple[int, ...] | None]) -> str:
    return ", ".join(dict.fromkeys(map(shape, found)))


def _layer_of(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()][:1]


def spans(numbers: Iterable[int]) -> str:
    """`0–3, 5 (5)`: whole numbers as ranges, and how many there are; a dash for none."""
    ordered = sorted(set(numbers))
    if not ordered:
        return "–"
    parts: list[list[int]] = []
    for number in ordered:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    text = ", ".join("–".join(map(str, part)) for part in parts)
    return f"{text} ({len(ordered)})" if len(ordered) > 1 else text


def shape(value: tuple[int, ...] | None) -> str:
    """`[24, 352, 256]`, or a dash."""
    return "–" if value is None else "[" + ", ".join(str(dim) for dim in value) + "]"


def component_rows(before: ModelFacts, after: ModelFacts) -> Table:
    """Bytes per component before and after, with the total last."""
    names = list(before.components) + [name for name in after.components if name not in before.components]
    triples = [(name, before.components.get(name, 0), after.components.get(name, 0)) for name in names]
    triples.append(("total", before.size_bytes, after.size_bytes))
    rows = tuple((name, size(a), size(b), change(a, b)) for name, a, b in triples)
    return Table(("Component", "Base", "This model", "Change"), rows, "lrrr", len(rows) - 1)


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
