"""What changed, as rows: tensors by kind with their layers, and bytes by component."""

from __future__ import annotations

from collections.abc import Iterable

from gemcut.report.data import ModelFacts, ReportData, Table
from gemcut.report.spelling import change, size
from gemcut.types import TensorFact


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
        moved = f"{min(known):.2g} – {max(known):.2g}" if known else "–"
        layers = [layer for fact in facts for layer in _layer_of(fact.name)]
        before, after = (
            _shapes(shapes) for shapes in zip(*((f.shape_before, f.shape_after) for f in facts), strict=True)
        )
        rows.append((pattern, spans(layers), spans(same.get(pattern, [])), found, before, after, moved))
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
