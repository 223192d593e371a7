"""The figures of a report, as SVG text. Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart;
state is never told by colour alone. The background is white and opaque, so that a figure stays legible on a dark page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gemcut.report.canvas import bare, canvas, plain_ticks, svg
from gemcut.report.data import ALL, Drawing, KldEntry, ReportData
from gemcut.report.grids import NEAR_TIE, CutGrid, Specialisation, cut_grid, mass_over_uniform, specialisation
from gemcut.report.palette import (
    BLUE,
    COMPONENT,
    CYCLE,
    GREEN,
    INK,
    KEPT,
    MUTED,
    ORANGE,
    PINK,
    RULE,
    VERMILION,
)
from gemcut.report.spelling import count, interval, size
from gemcut.report.tables import by_damage, units_name
from gemcut.report.text import plain
from gemcut.types import Estimate

XY: TypeAlias = tuple[float, float]


def draw_all(data: ReportData) -> tuple[Drawing, ...]:
    """Every figure that the data can fill, in the order of the page."""
    makers: tuple[Callable[[ReportData], Drawing | None], ...] = (criteria, damage, sizes, cut, specialists, routing)
    return tuple(drawing for make in makers if (drawing := make(data)) is not None)


def _note(axes: Axes, text: str, at: XY, offset: XY, colour: str = INK, *, bold: bool = False) -> None:
    """A word at a point of the data, moved by some points of the page."""
    style = {"color": colour, "fontsize": 8.8, "weight": "bold" if bold else "normal", "va": "center"}
    note = axes.annotate(text, at, offset, textcoords="offset points", annotation_clip=False)
    note.update(style)


def _dots(axes: Axes, y: float, value: Estimate, colour: str, *, strong: bool) -> None:
    """A dot on its interval."""
    width = 3.4 if strong else 2.2
    axes.plot([value.low, value.high], [y, y], color=colour, linewidth=width, alpha=0.45, zorder=2)
    axes.plot([value.value], [y], "o", color=colour, markersize=7.5 if strong else 5.5, zorder=3)


def _values_at_right(axes: Axes, texts: Mapping[float, tuple[str, bool]]) -> None:
    """Write each row's number in a column right of the axes, where no interval can cross it."""
    for y, (text, strong) in texts.items():
        note = axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.8)
        note.update({"color": INK if strong else MUTED, "weight": "bold" if strong else "normal"})


def _rows(axes: Axes, labels: list[str], bold: set[int]) -> None:
    axes.set_yticks(range(len(labels)), [plain(label)[:48] for label in labels])
    for i, tick in enumerate(axes.get_yticklabels()):
        tick.set_fontweight("bold" if i in bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")


def criteria(data: ReportData) -> Drawing | None:
    """Mean KLD of every measured candidate with its interval, least damage first, the chosen one highlighted."""
    entries = by_damage(data.kld)
    if not [entry for entry in entries if not entry.is_noise_floor]:
        return None
    means = {entry.label: row.mean for entry in entries if (row := entry.row()) is not None}
    with canvas(1.25 + 0.32 * len(entries)) as figure:
        axes = figure.subplots()
        values: dict[float, tuple[str, bool]] = {}
        for y, entry in enumerate(entries):
            strong = entry is data.entry
            colour = VERMILION if strong else MUTED if entry.is_noise_floor else BLUE
            _dots(axes, y, means[entry.label], colour, strong=strong)
            values[y] = (interval(means[entry.label]), strong)
        _values_at_right(axes, values)
        chosen = {i for i, entry in enumerate(entries) if entry is data.entry}
        _rows(axes, [_entry_label(entry) for entry in entries], chosen)
        cuts = [means[entry.label] for entry in entries if not entry.is_noise_floor]
        lowest, highest = min(mean.low for mean in cuts), max(mean.high for mean in cuts)
        wide = lowest > 0 and highest > 40 * lowest
        if wide:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
            axes.set_xlim(lowest / 1.6, highest * 1.6)
        else:
            axes.set_xlim(left=min(0.0, lowest))
            axes.axvline(0, color=INK, linewidth=1.2)
            _note(axes, "the base = 0", (0, -0.6), (4, 7), MUTED)
        n = _span([mean.n for mean in means.values()])
        scale = ", log scale; the base, 0, lies beyond the left edge" if wide else ""
        axes.set_xlabel(f"mean KLD from the base, nats per token (n = {n} chunks, 95 % intervals{scale})")
        what = "Damage by criterion at the same test" if data.plan else "Damage"
        axes.set_title(f"{what}: less is better", pad=16)
        caption = "Each dot is the mean KLD of one candidate from the base, with its 95 % interval over chunks"
        caption += f"; {data.entry.label} is the one that this report is about." if data.entry else "."
        return svg(figure, "criteria", plain(caption))


def _entry_label(entry: KldEntry) -> str:
    return f"{entry.label} (no cut)" if entry.is_noise_floor else entry.label


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def damage(data: ReportData) -> Drawing | None:
    """Mean KLD and ln PPL ratio per class of the chosen candidate."""
    if data.entry is None or not data.entry.result.rows:
        return None
    rows = sorted(data.entry.result.rows, key=lambda row: (row.cls == ALL, -row.mean.value, row.cls))
    labels = ["all classes" if row.cls == ALL else row.cls for row in rows]
    bold = {i for i, row in enumerate(rows) if row.cls == ALL}
    with canvas(1.3 + 0.34 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, pick, sign in ((left, "mean", False), (right, "ln_ppl_ratio", True)):
            values: dict[float, tuple[str, bool]] = {}
            for y, row in enumerate(rows):
                value: Estimate = getattr(row, pick)
                _dots(axes, y, value, INK if y in bold else VERMILION if pick == "mean" else BLUE, strong=y in bold)
                values[y] = (interval(value, sign=sign), y in bold)
            _values_at_right(axes, values)
            axes.axvline(0, color=INK, linewidth=1.2)
        _rows(left, [f"{label} (n = {count(row.mean.n)})" for label, row in zip(labels, rows, strict=True)], bold)
        right.tick_params(axis="y", length=0, labelleft=False)
        right.spines["left"].set_visible(False)
        right.grid(axis="x")
        left.set_title("Mean KLD")
        right.set_title("ln PPL ratio")
        left.set_xlabel("nats per token, 95 % intervals over chunks")
        right.set_xlabel("ln PPL(candidate) − ln PPL(base), above 0 is worse")
        for axes in (left, right):
            axes.locator_params(axis="x", nbins=4)
        return svg(
            figure,
            "damage",
            plain(f"What {data.entry.label} costs each class of text, most damaged first; n counts chunks."),
        )


def sizes(data: ReportData) -> Drawing | None:
    """Bytes per component before and after, stacked."""
    before, after = data.base.components, data.candidate.components
    names = [*before, *(name for name in after if name not in before)]
    if not names or data.only_quants:
        return None
    largest = max(data.base.size_bytes, data.candidate.size_bytes)
    unit, divisor = next(
        (u, d) for u, d in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if largest >= d or d == 2**10
    )
    with canvas(2.1) as figure:
        axes = figure.subplots()
        left = np.zeros(2)
        for i, name in enumerate(names):
            widths = np.array([before.get(name, 0), after.get(name, 0)]) / divisor
            colour = COMPONENT.get(name, CYCLE[i % len(CYCLE)])
            axes.barh([0, 1], widths, 0.58, left, color=colour, edgecolor="white", linewidth=1, label=plain(name)[:28])
            for y, width in enumerate(widths):
                if width > 0.045 * largest / divisor:
                    at = left[y] + width / 2
                    axes.text(at, y, f"{width:.1f}", ha="center", va="center", color="white", fontsize=9, weight="bold")
            left += widths
        for y, model in enumerate((data.base, data.candidate)):
            text = size(model.size_bytes)
            _note(axes, text, (float(left[y]), y), (6, 0), bold=True)
        _rows(axes, ["base", "this model"], {1})
        axes.set_xlim(0, max(left) * 1.14)
        axes.set_xlabel(f"{unit} on disk")
        axes.set_title("Size by component, before and after", pad=16 + 18 * -(-len(names) // 6))
        axes.legend(bbox_to_anchor=(-0.01, 0.98), ncols=min(len(names), 6))
        return svg(figure, "sizes", "Bytes of the weight files by component, in the base and in this model.")


def cut(data: ReportData) -> Drawing | None:
    """What was dropped and why: units by descending score within each layer, coloured by their fate."""
    grid = cut_grid(data)
    if grid is None or data.plan is None:
        return None
    colours = [VERMILION, KEPT, BLUE, GREEN, PINK, ORANGE]
    rows, columns = grid.state.shape
    cell = min(0.2, max(0.085, 6.4 / rows))
    with canvas(1.9 + cell * rows) as figure:
        axes = figure.subplots()
        axes.imshow(
            np.minimum(grid.state, len(colours) - 1),
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            aspect="auto",
            interpolation="none",
        )
        _grid_lines(axes, rows, columns)
        y, x = np.nonzero(grid.near_tie)
        axes.plot(x, y, "o", color=INK, markersize=min(3.5, 230 / columns), markeredgewidth=0, linestyle="none")
        for row, kept in enumerate(grid.kept):
            axes.plot([kept - 0.5, kept - 0.5], [row - 0.5, row + 0.5], color=INK, linewidth=1.8)
        _layer_ticks(axes, grid.layers)
        name = units_name(data)
        axes.set_xlabel(
            f"{name} of a layer by rank, highest {plain(data.plan.criterion)} score at the left"
            if grid.by_score
            else f"{name} of a layer, kept ones first"
        )
        fates = _fates(grid, colours)
        axes.set_title(
            f"What was dropped: {_dropped(grid)} of {count(rows * columns)} {name}", pad=10 + 18 * -(-len(fates) // 3)
        )
        axes.legend(handles=fates, bbox_to_anchor=(-0.01, 1.0), ncols=3)
        caption = (
            f"One row per layer, one cell per {units_name(data, 1)}; the black line is where the kept number ends."
        )
        if grid.reasons:
            caption += " What a guard keeps beyond it takes the place of a higher score before it."
        return svg(figure, "cut", plain(caption))


def _dropped(grid: CutGrid) -> str:
    return count(int((grid.state == 0).sum()))


def _fates(grid: CutGrid, colours: list[str]) -> list[Patch | Line2D]:
    def number(state: int) -> str:
        return count(int((grid.state == state).sum()))

    handles: list[Patch | Line2D] = [
        Patch(color=KEPT, label=f"kept ({number(1)})"),
        Patch(color=VERMILION, label=f"dropped ({number(0)})"),
    ]
    for i, reason in enumerate(grid.reasons):
        colour = colours[min(2 + i, len(colours) - 1)]
        handles.append(Patch(color=colour, label=f"kept only by a guard: {plain(reason)[:32]} ({number(2 + i)})"))
    if grid.near_tie.any():
        low, high = (round(100 * p) for p in NEAR_TIE)
        dot = Line2D([], [], marker="o", linestyle="none", color=INK, markersize=4)
        dot.set_label(f"near tie, keep probability {low} to {high} % ({count(int(grid.near_tie.sum()))})")
        handles.append(dot)
    return handles


def _grid_lines(axes: Axes, rows: int, columns: int) -> None:
    """Thin white lines between cells, and no spines."""
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="both", color="white", linewidth=1.0 if columns <= 64 else 0.4)
    bare(axes)


def _layer_ticks(axes: Axes, layers: tuple[int, ...]) -> None:
    positions = list(range(0, len(layers), 1 if len(layers) <= 16 else 5))
    axes.set_yticks(positions, [str(layers[i]) for i in positions])
    axes.set_ylabel("layer")


def routing(data: ReportData) -> Drawing | None:
    """Layers × experts per class: share of router mass over the uniform share, small multiples on one scale."""
    if data.statistics is None or not data.statistics.meta.layers or not data.statistics.meta.classes:
        return None
    meta = data.statistics.meta
    mass, name = mass_over_uniform(data.statistics)
    columns = 2 if len(meta.classes) in (2, 4) else min(3, len(meta.classes))
    lines = -(-len(meta.classes) // columns)
    top = max(2.0, float(np.percentile(mass, 99.5)))
    items = {cls: sum(question.cls == cls for question in meta.questions) for cls in meta.classes}
    height = min(2.6, max(1.05, 0.075 * len(meta.layers)))
    with canvas(1.25 + lines * (height + 0.35)) as figure:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for i, axes in enumerate(grid.flat):
            if i >= len(meta.classes):
                axes.set_axis_off()
                continue
            cls = meta.classes[i]
            image = axes.imshow(mass[i], "cividis", norm=PowerNorm(0.5, 0, top), aspect="auto", interpolation="none")
            axes.set_title(f"{plain(cls)[:24]}  (n = {count(items[cls])} items)", fontsize=9.5, weight="normal")
            bare(axes)
            axes.set_xticks([0, mass.shape[2] // 2, mass.shape[2] - 1])
            axes.set_yticks([0, len(meta.layers) - 1], [str(meta.layers[0]), str(meta.layers[-1])])
        columns_are = "experts of a layer, the busiest over all classes at the left, in the same order in every panel"
        figure.supxlabel(columns_are, fontsize=9.5, color=MUTED)
        figure.supylabel("layer", fontsize=9.5, color=MUTED)
        figure.suptitle("Where each class is routed", x=0.0, ha="left", fontsize=11.5, weight="bold")
        ticks = [0, 1, *(value for value in (2, 4, 8, 16, 32, 64) if value <= top)]
        bar = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.015, extend="max", ticks=ticks)
        bar.set_label("router mass, × uniform share" if name == "g" else "routed tokens, × uniform share", color=MUTED)
        bar.outline.set_visible(False)
        caption = "Router mass of each class per expert, where 1 is a uniform router; a bright cell in one panel only"
        return svg(figure, "routing", caption + " is a specialist of that class.")


def specialists(data: ReportData) -> Drawing | None:
    """Distance of each class's routing from the other classes' per layer, with what chance alone would give."""
    found = specialisation(data.statistics) if data.statistics is not None else None
    if found is None:
        return None
    with canvas(3.5) as figure:
        axes = figure.subplots()
        x = np.arange(len(found.layers))
        axes.fill_between(x, 0, found.chance, color=RULE, linewidth=0, zorder=1)
        _note(axes, "chance: shuffled classes stay below (97.5 %)", (float(x[0]), 0.0), (4, 8), MUTED)
        markers = "osD^vPX*"
        for c in range(len(found.classes)):
            colour = CYCLE[c % len(CYCLE)]
            axes.fill_between(x, found.low[c], found.high[c], color=colour, alpha=0.16, linewidth=0)
            axes.plot(
                x, found.distance[c], color=colour, linewidth=1.8, marker=markers[c % len(markers)], markersize=4.5
            )
        _end_labels(axes, found, float(x[-1]))
        axes.set_xticks(
            x[:: 1 if len(x) <= 16 else 5], [str(layer) for layer in found.layers[:: 1 if len(x) <= 16 else 5]]
        )
        axes.set_ylim(0, min(1.0, 1.15 * float(found.high.max())))
        axes.set_xlim(x[0] - 0.15, x[-1] + 0.15)
        axes.grid(axis="y")
        axes.tick_params(axis="y", colors=MUTED)
        axes.set_xlabel("layer (bands: 95 % intervals over calibration items)")
        axes.set_ylabel("total variation distance, 0 to 1")
        axes.set_title("How differently each class is routed")
        caption = (
            "Total variation distance between a class's routed tokens and those of all others: the share that would"
        )
        return svg(figure, "specialists", caption + " have to change experts to make them alike.")


def _end_labels(axes: Axes, found: Specialisation, x: float) -> None:
    """Name each line at its right end, pushed apart where lines end close together."""
    gap = 0.062 * 1.15 * float(found.high.max())
    order = np.argsort(found.distance[:, -1], kind="stable")
    at = found.distance[order, -1].copy()
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    at -= (at - found.distance[order, -1]).mean()
    for y, c in zip(at, order, strict=True):
        name = f"{plain(found.classes[c])[:20]} (n = {count(found.questions[c])} items)"
        _note(axes, name, (x, float(y)), (10, 0), CYCLE[c % len(CYCLE)], bold=True)
