"""What a heal came to: one check, a table by layer, and a table by class of text."""

from __future__ import annotations

from gemcut.records.heal import HealReport
from gemcut.report.changes import spans
from gemcut.report.data import Check, Extra, Table
from gemcut.report.spelling import change, count
from gemcut.types import Kind


def heal_checks(report: HealReport | None) -> tuple[Check, ...]:
    """What a heal came to, in one line."""
    if report is None:
        return ()
    better = [one for one in report.layers if one.used]
    if not better:
        return (Check("heal", True, "no layer's heal beat the cut without it on held-out items: none is used"),)
    before = sum(one.held_out_before for one in better) / len(better)
    after = sum(one.held_out_after for one in better) / len(better)
    text = f"used in {len(better)} of {len(report.layers)} layers; mean held-out residual {before:.4f} → {after:.4f} "
    return (Check("heal, on held-out items", True, text + f"({report.tokens} tokens, {report.items} items)"),)


def heal_tables(report: HealReport | None, kind: Kind) -> tuple[Extra, ...]:
    """A heal layer by layer, and class by class where the classes are known."""
    if report is None:
        return ()
    return (_by_layer(report, kind), *_by_class(report))


def _by_layer(report: HealReport, kind: Kind) -> Extra:
    rows = tuple(
        (
            str(one.layer),
            ", ".join(map(str, one.dropped)) or "–",
            count(one.samples),
            f"{one.ridge:g}",
            f"{one.condition:.1e}",
            f"{one.held_out_before:.4f}",
            f"{one.held_out_after:.4f}",
            "yes" if one.used else "no",
        )
        for one in report.layers
    )
    columns = ("Layer", "Dropped", "Samples", "Ridge", "Condition", "No heal", "Healed", "Used")
    branch, what = "what the attention branch adds to the residual stream", "each output projection"
    if kind == "experts":
        branch = "the experts' sum, after its best common factor,"
        part = "output projections" if report.settings.get("experts") == "down_proj" else "scales"
        what = f"the {part} of the experts that stay"
    text = (
        f"Relative residual of {branch} on {report.held_out_items} held-out of {report.items} items, "
        f"{report.method}, {what} refitted towards the original. A layer whose heal is no "
        "better keeps its old weights."
    )
    return Extra("Heal, layer by layer", text, Table(columns, rows, "rrrrrrrl"))


def _by_class(report: HealReport) -> tuple[Extra, ...]:
    """Means over the layers whose heal is used, and where a class of text would rather have none."""
    used = [one for one in report.layers if one.used and one.by_class]
    rows = []
    for cls in sorted({cls for one in used for cls in one.by_class}):
        found = {one.layer: one.by_class[cls] for one in used if cls in one.by_class}
        before, after = (
            sum(values) / len(found) for values in zip(*((r.before, r.after) for r in found.values()), strict=True)
        )
        worse = spans(layer for layer, residual in found.items() if residual.after >= residual.before)
        tokens = min(residual.samples for residual in found.values())
        gain = f"{change(round(before * 1e6), round(after * 1e6))}"
        rows.append((cls, count(tokens), f"{before:.4f}", f"{after:.4f}", gain, worse))
    if not rows:
        return ()
    columns = ("Class", "Held-out tokens", "No heal", "Healed", "Change", "Layers where it is no better")
    layers = f"{len(used)} layers" if len(used) > 1 else "one layer"
    text = (
        f"The same residuals on held-out items of each class of text, mean over the {layers} whose heal is used. A "
        "class that gains far less than the others, or loses, is one that the calibration text does not stand for."
    )
    return (Extra("Heal, class by class", text, Table(columns, tuple(rows), "lrrrrr")),)
