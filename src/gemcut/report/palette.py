"""Colours and type of the figures, as plain values.

Okabe and Ito's colours (2008): colour-blind readers can tell them apart. White and opaque behind, for dark pages.
"""

from __future__ import annotations

WIDTH_INCHES = 9.2
INK, MUTED, RULE = "#1b2430", "#5b6673", "#e3e7ec"
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PINK, YELLOW, BLACK = "#56b4e9", "#cc79a7", "#f0e442", "#3d3d3d"
CYCLE = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK, "#8c6d31")
KEPT = "#c9d6e2"
# a component has one colour whatever else the model has
COMPONENT = {
    "experts": BLUE,
    "attention": VERMILION,
    "dense mlp": GREEN,
    "embedding": PINK,
    "router": ORANGE,
    "norms": SKY,
    "vision": BLACK,
    "other": "#9aa5b1",
}
STYLE: dict[str, str | float | bool | list[str]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gemcut",
    "text.parse_math": False,  # a class may be named `$x$`
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "x",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.loc": "lower left",
    "legend.handlelength": 1.0,
    "legend.handleheight": 1.0,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.3,
}
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
