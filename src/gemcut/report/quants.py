"""The GGUF files of a run: what they weigh, what they cost, and what runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING, Literal

from gemcut.report.data import ALL, KldEntry, Table
from gemcut.report.spelling import count, interval, size
from gemcut.types import KldRow

if TYPE_CHECKING:
    from gemcut.report.bits import Cell

Role = Literal["model", "mmproj", "drafter"]
How = Literal["stock", "layers", "size", "card"]

MADE: Mapping[str, str] = {
    "stock": "stock mix",
    "layers": "by layers (ContribDynamic)",
    "size": "solved for a size",
    "card": "solved for a card",
}


@dataclass(frozen=True, slots=True)
class Quant:
    """One file.

    asked: what its name says of it, as `Q4_K_M` or `5.5MiB`.   bits_per_weight: as stored, norms included.
    imatrix: the variant that entered its bytes, "" for none.   kld: against the base; None where it was not measured.
    expected: mean KLD that the solver expected.   memory: of a card, part → bytes.   cells: tensors, for a map of bits.
    """

    name: str
    role: Role
    asked: str
    how: How
    size_bytes: int
    bits_per_weight: float
    imatrix: str = ""
    types: Mapping[str, int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    kld: KldEntry | None = None
    expected: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()

    @property
    def row(self) -> KldRow | None:
        """The pooled row of its measurement."""
        return None if self.kld is None else self.kld.row(ALL)


@dataclass(frozen=True, slots=True)
class Quants:
    """All files made of one model.

    source: that model's name.   source_bytes: of its safetensors.   against: what KLD is measured from, for people.
    floor: the base as BF16, against itself: what other arithmetic does.   cut: the same model before it is quantised.
    method: how the mixes came about, as pairs.
    """

    files: tuple[Quant, ...]
    source: str
    source_bytes: int
    against: str
    floor: KldEntry | None = None
    cut: KldEntry | None = None
    method: tuple[tuple[str, str], ...] = ()

    @property
    def models(self) -> tuple[Quant, ...]:
        """Model files, largest first."""
        return tuple(
            sorted((one for one in self.files if one.role == "model"), key=lambda one: (-one.size_bytes, one.name))
        )

    @property
    def others(self) -> tuple[Quant, ...]:
        """Projectors and drafters."""
        return tuple(one for one in self.files if one.role != "model")

    @property
    def measured(self) -> tuple[tuple[Quant, KldRow], ...]:
        """Model files whose damage is known, largest first."""
        return tuple((one, row) for one in self.models if (row := one.row) is not None)

    def beside(self, role: Role) -> Quant | None:
        """The first projector or drafter."""
        return next((one for one in self.files if one.role == role), None)


def front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Indices of the points that no other one beats, by the first number ascending: another beats a point if it is no
    larger in both numbers and smaller in one."""
    out: list[int] = []
    best = float("inf")
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            out.append(i)
    return tuple(out)


def on_front(quants: Quants) -> frozenset[str]:
    """Names of the files that no other file beats in size and mean KLD."""
    measured = quants.measured
    found = front([(float(one.size_bytes), row.mean.value) for one, row in measured])
    return frozenset(measured[i][0].name for i in found)


def quant_rows(quants: Quants, *, short: bool = False) -> Table:
    """Every file, largest first, projectors and drafters behind them, then the floor of noise. `short`: file types in
    place of whole names."""
    best = on_front(quants)
    rows = []
    for one in (*quants.models, *quants.others):
        rows.append(
            (
                (one.asked if one.role == "model" else f"{one.role} {one.asked}") if short else one.name,
                size(one.size_bytes),
                f"{one.bits_per_weight:.2f}",
                one.imatrix or "–",
                *_measured(one.row),
                "yes" if one.name in best else "",
            )
        )
    for entry in (quants.cut, quants.floor):
        if entry is not None:
            rows.append((entry.label, "–", "–", "–", *_measured(entry.row()), ""))
    columns = (
        "File", "Size", "Bits per weight", "Importances", "Mean KLD, nats", "Same top token, %", "Median, nats",
        "99th percentile, nats", "ln PPL ratio", "n chunks", "On the front",
    )  # fmt: skip
    return _without_blanks(Table(columns, tuple(rows), "lrrlrrrrrrl"))


def class_quant_rows(quants: Quants) -> Table | None:
    """Mean KLD of every file by class of text; None where there is one class."""
    measured = [(one, one.kld) for one in quants.models if one.kld is not None]
    classes = list(dict.fromkeys(row.cls for _, kld in measured for row in kld.result.rows if row.cls != ALL))
    if len(classes) < 2:
        return None
    rows = []
    for one, kld in measured:
        found = [kld.row(cls) for cls in classes]
        rows.append((one.asked, *("–" if row is None else interval(row.mean) for row in found)))
    return Table(("Mean KLD, nats", *classes), tuple(rows), "l" + "r" * len(classes))


def _measured(row: KldRow | None) -> tuple[str, ...]:
    if row is None:
        return ("–",) * 6
    return (
        interval(row.mean),
        interval(row.same_top, scale=100),
        interval(row.median),
        interval(row.p99),
        interval(row.ln_ppl_ratio, sign=True),
        count(row.mean.n),
    )


def _without_blanks(table: Table) -> Table:
    """The table without columns in which nothing is said."""
    kept = [i for i in range(len(table.columns)) if any(row[i] not in ("–", "") for row in table.rows)]
    return Table(
        tuple(table.columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in table.rows),
        "".join(table.align[i] for i in kept),
        table.chosen,
    )


def make_rows(quants: Quants) -> Table:
    """How each file came by its types: stock, by layers, or solved, with the KLD that the solver expected."""
    rows = []
    for one in (*quants.models, *quants.others):
        mean = one.row.mean if one.row is not None else None
        rows.append(
            (
                one.name,
                MADE[one.how] if one.role == "model" else {"mmproj": "vision tower", "drafter": "drafter"}[one.role],
                ", ".join(f"{kind} {number}" for kind, number in one.types.items()),
                "–" if one.expected is None else f"{one.expected:.4f}",
                "–" if one.expected is None or mean is None else f"{mean.value:.4f}",
            )
        )
    columns = ("File", "Mix", "Tensors of each type", "KLD expected by the solver", "measured")
    return _without_blanks(Table(columns, tuple(rows), "lllrr"))


def memory_rows(quants: Quants) -> Table | None:
    """Where the memory of a card goes, part by part; None where no file was made for one."""
    cards = [one for one in quants.models if one.memory]
    if not cards:
        return None
    parts = list(dict.fromkeys(part for one in cards for part in one.memory))
    rows = []
    for one in cards:
        total = one.size_bytes + sum(one.memory.values())
        rows.append((one.name, size(one.size_bytes), *(size(one.memory.get(part, 0)) for part in parts), size(total)))
    return Table(("File", "Weights", *parts, "Together"), tuple(rows), "l" + "r" * (len(parts) + 2))


def sum_rows(quants: Quants) -> Table:
    """Every part with its whole sha256."""
    rows = tuple((name, digest) for one in quants.files for name, digest in sorted(one.sha256.items()))
    return Table(("File", "sha256"), rows, "ll")


def quants_headline(quants: Quants) -> str:
    """Files from the smallest to the largest, and the best of the small ones in one sentence."""
    models = quants.models
    if not models:
        return f"{count(len(quants.files))} GGUF files of {quants.source}."
    spread = f"{size(models[-1].size_bytes)} to {size(models[0].size_bytes)}"
    start = f"{count(len(models))} GGUF files of {quants.source}, {spread}" if len(models) > 1 else (
        f"{models[0].name}: {size(models[0].size_bytes)}"
    )  # fmt: skip
    start += f", from {size(quants.source_bytes)} of safetensors"
    measured = quants.measured
    if not measured:
        return f"{start}. What they cost has not been measured."
    chosen, row = _worth(quants)
    return (
        f"{start}. {chosen.asked} ({size(chosen.size_bytes)}, {chosen.bits_per_weight:.2f} bits per weight) costs "
        f"{interval(row.mean)} nats per token (mean KLD from {quants.against}, n = {count(row.mean.n)} chunks) and "
        f"keeps the most likely token at {interval(row.same_top, scale=100)} % of positions."
    )


def quants_figures(quants: Quants) -> tuple[tuple[str, str, str], ...]:
    """Boxes under the headline: label, value, note."""
    models = quants.models
    out = []
    if models:
        for word, one in (("Largest", models[0]), ("Smallest", models[-1])):
            out.append(
                (f"{word} file", size(one.size_bytes), f"{one.asked}, {one.bits_per_weight:.2f} bits per weight")
            )
    if quants.measured:
        one, row = _worth(quants)
        n = f"n = {count(row.mean.n)} chunks"
        for label, value, unit in (
            (f"Mean KLD of {one.asked}, nats", interval(row.mean), ""),
            (f"Same most likely token, {one.asked}", interval(row.same_top, scale=100), " %"),
        ):
            middle, rest = value.split(" ", 1)
            out.append((label, middle + unit, f"{rest} · {n}"))
    for beside, label in ((quants.beside("mmproj"), "Vision tower"), (quants.beside("drafter"), "Drafter")):
        if beside is not None:
            out.append((label, size(beside.size_bytes), beside.asked))
    if quants.floor is not None and (floor := quants.floor.row()) is not None:
        middle, rest = interval(floor.mean).split(" ", 1)
        out.append(("Noise floor, nats", middle, rest))
    return tuple(out)


def worth(quants: Quants) -> Quant:
    """The file to begin with: the knee of the front where damage is known, else the middle one by size."""
    return _worth(quants)[0] if quants.measured else quants.models[len(quants.models) // 2]


def _worth(quants: Quants) -> tuple[Quant, KldRow]:
    """The file of the front whose share of size and of ln KLD saved is largest: the knee of the curve, as a default."""
    best = on_front(quants)
    points = [(one, row) for one, row in quants.measured if one.name in best]
    sizes = [one.size_bytes for one, _ in points]
    damages = [log(max(row.mean.value, 1e-9)) for _, row in points]
    wide, tall = max(sizes) - min(sizes) or 1, max(damages) - min(damages) or 1.0

    def distance(i: int) -> float:
        return (sizes[i] - min(sizes)) / wide + (damages[i] - min(damages)) / tall

    return points[min(range(len(points)), key=distance)]


def limits_of(quants: Quants) -> tuple[str, ...]:
    """What a reader must know before quoting these files' figures."""
    out = []
    if not quants.measured:
        out.append("The damage of the GGUF files has not been measured on held-out text.")
        return tuple(out)
    out.append(
        "All files were measured on the same chunks, so their intervals move together: overlap alone does not mean "
        "that two of them are equal. The front is drawn through the means."
    )
    floor = quants.floor.row() if quants.floor is not None else None
    if floor is None:
        out.append(
            "The base ran in transformers and the files in llama.cpp: a part of the KLD is the arithmetic, and how "
            "much was not measured here."
        )
    else:
        out.append(
            f"The base ran in transformers and the files in llama.cpp: of every KLD about {interval(floor.mean)} nats "
            "are the arithmetic (the base as a BF16 file)."
        )
    return tuple(out)
