"""Size against damage of GGUF files, with the front that no file beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemcut.report.bits import bits
from gemcut.report.canvas import canvas, plain_ticks, svg
from gemcut.report.data import Drawing
from gemcut.report.palette import BLUE, GREEN, INK, MUTED, ORANGE, RULE, VERMILION
from gemcut.report.quants import MADE, Quant, Quants, front
from gemcut.report.spelling import count, interval
from gemcut.report.text import plain
from gemcut.types import Estimate, KldRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOK = {"stock": (BLUE, "o"), "layers": (GREEN, "s"), "size": (VERMILION, "D"), "card": (ORANGE, "^")}
_HEIGHT = 4.3
_MAPS = 6  # maps of bits in one report
_FONT = 8.6
_WIDE = 8  # times from the least to the greatest damage from which the scale is logarithmic
_NEAR_FLOOR = 6  # times below the best file up to which the floor is drawn to scale


@dataclass(frozen=True, slots=True)
class _Point:
    file: Quant
    x: float
    value: Estimate


def draw_quants(quants: Quants) -> tuple[Drawing, ...]:
    """Size × KLD, size × same top token, and where the bits of every solved or layered file are."""
    maps = [_map(one) for one in quants.models if one.how != "stock"][:_MAPS]
    drawings = (kld(quants), same_top(quants), *maps)
    return tuple(drawing for drawing in drawings if drawing is not None)


def _map(file: Quant) -> Drawing | None:
    return bits(file.cells, file.asked, name="bits-" + "".join(c if c.isalnum() else "-" for c in file.asked.lower()))


def kld(quants: Quants) -> Drawing | None:
    """Mean KLD over size with the front, on a log scale where the files are far apart; the floor of noise, and what the
    cut alone costs, as lines."""
    found = _points(quants, lambda row: row.mean)
    if len(found) < 2:
        return None
    unit, _ = _unit(quants)
    floor, cut = (None if one is None else one.row() for one in (quants.floor, quants.cut))
    lowest, highest = min(max(p.value.low, p.value.value / 3) for p in found), max(p.value.high for p in found)
    near = floor is not None and floor.mean.low > lowest / _NEAR_FLOOR
    if cut is not None:
        lowest, highest = min(lowest, cut.mean.low), max(highest, cut.mean.high)
    if floor is not None and near:
        lowest = min(lowest, floor.mean.low)
    wide = lowest > 0 and highest > _WIDE * lowest
    with canvas(_HEIGHT) as figure:
        axes = figure.subplots()
        if wide:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
            axes.set_ylim(lowest / 1.7, highest * 2.2)
        else:
            axes.set_ylim(lowest - 0.2 * (highest - lowest), highest + 0.3 * (highest - lowest))
        best = front([(p.x, p.value.value) for p in found])
        if floor is not None:
            _line(axes, f"noise floor: the base in BF16, {interval(floor.mean)}", floor.mean, shown=near)
        if cut is not None:
            _line(axes, f"the cut itself, {interval(cut.mean)}", cut.mean, shown=True)
        _draw(axes, found, best)
        axes.set_xlabel(f"{unit} on disk")
        axes.set_ylabel(f"mean KLD from {plain(quants.against)}, nats per token{', log scale' if wide else ''}")
        axes.yaxis.label.set_fontsize(9)
        n = count(found[0].value.n)
        axes.set_title(f"Size and damage of the GGUF files: lower left is better (n = {n} chunks)")
        _label(figure, axes, found, best, up=True)
        caption = (
            "Each point is one file with its 95 % interval over chunks; the line is the front: files that no other "
            "file beats in both size and mean KLD. Hollow points use no importances."
        )
        return svg(figure, "quants-kld", caption)


def _line(axes: Axes, text: str, mean: Estimate, *, shown: bool) -> None:
    """A band for what is there without any rounding of bits; a word at the bottom where it lies far below."""
    if shown:
        axes.axhspan(mean.low, mean.high, color=RULE, alpha=0.55, linewidth=0, zorder=0)
        axes.axhline(mean.value, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1, label=text)
        return
    note = axes.annotate(
        f"{text}, lies below", (0.995, 0.0), (0, 6), xycoords="axes fraction", textcoords="offset points", ha="right"
    )
    note.update({"fontsize": _FONT, "color": MUTED})


def same_top(quants: Quants) -> Drawing | None:
    """Share of positions with the same most likely token over size."""
    found = _points(quants, lambda row: row.same_top)
    if len(found) < 2:
        return None
    unit, _ = _unit(quants)
    with canvas(_HEIGHT) as figure:
        axes = figure.subplots()
        scaled = [
            _Point(p.file, p.x, Estimate(100 * p.value.value, 100 * p.value.low, 100 * p.value.high, p.value.n))
            for p in found
        ]
        low = min(p.value.low for p in scaled)
        high = max(p.value.high for p in scaled)
        axes.set_ylim(max(0.0, low - 0.2 * (high - low)), min(100.0, high) + 0.06 * (high - low))
        best = front([(p.x, -p.value.value) for p in scaled])
        _draw(axes, scaled, best, "lower right")
        axes.set_xlabel(f"{unit} on disk")
        axes.set_ylabel("same most likely token, % of positions")
        axes.set_title(f"Size and agreement with the base: upper left is better (n = {count(found[0].value.n)} chunks)")
        _label(figure, axes, scaled, best, up=False)
        caption = (
            "Share of positions at which the file's most likely token is the base's, with 95 % intervals over chunks; "
            "the line joins the files that no other file beats in both size and agreement."
        )
        return svg(figure, "quants-top", caption)


def _unit(quants: Quants) -> tuple[str, int]:
    largest = max(one.size_bytes for one in quants.models)
    return next((name, scale) for name, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
                if largest >= scale)  # fmt: skip


def _points(quants: Quants, pick: Callable[[KldRow], Estimate]) -> list[_Point]:
    if not quants.models:
        return []
    _, scale = _unit(quants)
    return [_Point(one, one.size_bytes / scale, pick(row)) for one, row in quants.measured]


def _draw(axes: Axes, found: Sequence[_Point], best: Sequence[int], legend: str = "upper right") -> None:
    """The front, then every file on its interval; one legend entry for each way that a mix was made."""
    xs = [p.x for p in found]
    room = (max(xs) - min(xs)) or max(xs)
    axes.set_xlim(min(xs) - 0.06 * room, max(xs) + 0.16 * room)
    line = [found[i] for i in best]
    axes.plot([p.x for p in line], [p.value.value for p in line], color=INK, linewidth=1.2, alpha=0.55, zorder=2)
    seen: set[str] = set()
    for i, p in enumerate(found):
        colour, marker = _LOOK[p.file.how]
        axes.plot([p.x, p.x], [p.value.low, p.value.high], color=colour, linewidth=2.0, alpha=0.45, zorder=3)
        for y in (p.value.low, p.value.high):
            axes.plot([p.x], [y], "_", color=colour, markersize=5, alpha=0.6, zorder=3)
        label = "" if p.file.how in seen else MADE[p.file.how]
        seen.add(p.file.how)
        axes.plot(
            [p.x], [p.value.value], marker, color=colour, markersize=7.5 if i in best else 5.5, linestyle="none",
            markerfacecolor=colour if p.file.imatrix else "white", label=label or "_", zorder=4,
        )  # fmt: skip
    axes.grid(axis="both")
    axes.tick_params(axis="y", colors=MUTED)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc=legend)


def _label(figure: Figure, axes: Axes, found: Sequence[_Point], best: Sequence[int], *, up: bool) -> None:
    """Each file's type beside its point, where it covers neither another point nor another label: files of the front
    choose first. `up`: the side of the front where there is room."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []
    for p in found:
        x, low = axes.transData.transform((p.x, p.value.low))
        _, high = axes.transData.transform((p.x, p.value.high))
        taken.append((x - 4 * scale, low - 3 * scale, x + 4 * scale, high + 3 * scale))
    for i in sorted(range(len(found)), key=lambda i: (i not in best, found[i].x)):
        p = found[i]
        text = plain(p.file.asked)[:20]
        width, height = 0.62 * _FONT * len(text) * scale, 1.25 * _FONT * scale
        x, y = axes.transData.transform((p.x, p.value.value))
        offset, box = _free(x, y, (width, height), scale if up else -scale, taken)
        taken.append(box)
        note = axes.annotate(
            text, (p.x, p.value.value), (offset[0] / scale, offset[1] / scale), textcoords="offset points",
            va="center", annotation_clip=False,
        )  # fmt: skip
        note.update(
            {"fontsize": _FONT, "color": INK if i in best else MUTED, "weight": "bold" if i in best else "normal"}
        )


def _free(
    x: float,
    y: float,
    size: tuple[float, float],
    scale: float,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    """The nearest free place of a label, as the offset of its left middle, in pixels; the first where none is free.

    Args:
        scale: pixels of a point; negative to look below before above.
    """
    width, height = size
    places = []
    for rise in (7.0, 0.0, -7.0, 14.0, -14.0, 22.0, -22.0, 32.0, -32.0):
        for across in (8 * abs(scale), -width - 8 * abs(scale)):
            places.append((across, rise * scale))
        if abs(rise) > 10:
            places.append((-width / 2, rise * scale * 1.2))
    boxes = [(x + a, y + b - height / 2, x + a + width, y + b + height / 2) for a, b in places]
    for place, box in zip(places, boxes, strict=True):
        if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return place, box
    return places[0], boxes[0]
