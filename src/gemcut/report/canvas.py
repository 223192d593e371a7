"""What every figure is drawn on, and how it becomes SVG text.

The same data give the same bytes: fixed salt for ids, no date, no program version, text kept as text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gemcut.report.data import Drawing
from gemcut.report.palette import FONTS, STYLE, WIDTH_INCHES


@contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """A figure of the page's width and so many inches high, in the project's style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def svg(figure: Figure, name: str, caption: str) -> Drawing:
    """Render, and make ids unique to the figure, so that many can stand in one page."""
    with io.StringIO() as out, mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the reader's fonts have the glyph
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda m: f"{m.group(1)}{name}-", text)
    text = text.replace("'DejaVu Sans'", FONTS)
    label = re.sub(r"[&<>\"]", lambda m: f"&#{ord(m.group(0))};", caption)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Drawing(name, caption, text)


def plain_ticks(axis: XAxis | YAxis) -> None:
    """Ticks of a log scale as plain numbers: exponents would be drawn as mathematics, which is off."""
    axis.set_major_formatter(lambda value, _: f"{value:.9f}".rstrip("0").rstrip("."))
    axis.set_minor_formatter(lambda *_: "")


def bare(axes: Axes) -> None:
    """No spines and no tick marks: for grids of cells."""
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
