"""Where the bits of a GGUF file are: a map of layers and tensor kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.report.canvas import bare, canvas, svg
from gemcut.report.data import Drawing
from gemcut.report.palette import INK, MUTED
from gemcut.report.text import plain

# From what enters a layer to what leaves it; other kinds come behind, by name.
ORDER = (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_up_exps", "ffn_gate_exps",
    "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip
_NAMED_LAYERS = 16  # up to here there is room for the type's name in every cell
_DARK = 0.62  # share of the scale below which a cell is dark


@dataclass(frozen=True, slots=True)
class Cell:
    """One tensor. layer: None outside of the blocks.   bpw: as stored.   kind: its type's name."""

    role: str
    layer: int | None
    bpw: float
    kind: str
    elements: int


def bits(cells: Sequence[Cell], title: str, *, name: str = "bits") -> Drawing | None:
    """Bits of a weight by layer and tensor kind; None where there is no layer to show. What stands outside of the
    layers is named below the map."""
    inside = [cell for cell in cells if cell.layer is not None]
    if not inside:
        return None
    layers = max(cell.layer for cell in inside if cell.layer is not None) + 1
    found = {cell.role for cell in inside}
    roles = [*(role for role in ORDER if role in found), *sorted(found - set(ORDER))]
    grid = np.full((len(roles), layers), np.nan)
    for cell in inside:
        grid[roles.index(cell.role), cell.layer] = cell.bpw
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    with canvas(1.5 + 0.34 * len(roles)) as figure:
        axes = figure.subplots()
        image = axes.imshow(grid, "cividis", vmin=low, vmax=max(high, low + 0.5), aspect="auto", interpolation="none")
        bare(axes)
        axes.set_yticks(range(len(roles)), [plain(role)[:32] for role in roles])
        step = 1 if layers <= 32 else 5
        axes.set_xticks(range(0, layers, step))
        outside = ", ".join(f"{plain(c.role)} {plain(c.kind)} ({c.bpw:.2f})" for c in cells if c.layer is None)
        axes.set_xlabel(f"layer\noutside of the layers: {outside}" if outside else "layer")
        if layers <= _NAMED_LAYERS:
            for cell in inside:
                dark = cell.bpw < low + _DARK * (max(high, low + 0.5) - low)
                at = (float(cell.layer or 0), float(roles.index(cell.role)))
                note = axes.annotate(plain(cell.kind), at, ha="center", va="center", fontsize=7.2)
                note.update({"color": "white" if dark else INK})
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015)
        bar.set_label("bits per weight, as stored", color=MUTED)
        bar.outline.set_visible(False)
        total = sum(cell.bpw * cell.elements for cell in cells) / sum(cell.elements for cell in cells)
        axes.set_title(f"{plain(title)}: {total:.2f} bits per weight in its matrices")
        caption = (
            "Bits of a weight as stored, by layer and kind of tensor; an empty cell is a tensor that the layer has not"
        )
        return svg(figure, name, f"{caption}. Outside of the layers: {outside or 'nothing'}.")
