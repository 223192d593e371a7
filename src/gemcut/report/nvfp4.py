"""The NVFP4 checkpoint of a run: what it weighs, how far its weights are off, what it cost, and how it is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemcut.report.data import ALL, KldEntry, Table
from gemcut.report.spelling import change, count, interval, size
from gemcut.types import StatisticsMeta

_NAMED = 3  # borrowers that a sentence names


@dataclass(frozen=True, slots=True)
class Nvfp4Part:
    """Matrices of one part of the decoder.   relative_error: mean of ‖w' − w‖ / ‖w‖.   worst: the largest, module."""

    part: str
    linears: int
    parameters: int
    size_bytes_before: int
    size_bytes: int
    relative_error: float
    worst: tuple[str, float]


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """One folder.

    source: what was quantised, source_bytes of weights.   asked: word → what was chosen.   left: why → linears that do.
    borrowed: linears of experts that saw too little text and have their peers' scales.
    serve: the command, for a shell.   needs: what it needs, in sentences.   kld: against `against`.
    """

    name: str
    source: str
    source_bytes: int
    size_bytes: int
    scheme: str
    layout: str
    asked: Mapping[str, str]
    parts: tuple[Nvfp4Part, ...]
    serve: str
    needs: tuple[str, ...]
    left: Mapping[str, int]
    borrowed: tuple[str, ...]
    corpus: str = ""  # hash of what was observed
    observed: StatisticsMeta | None = None
    kld: KldEntry | None = None
    against: str = ""

    @property
    def loads(self) -> bool:
        """Whether `gemcut.load` reads the layout."""
        return self.layout == "compressed-tensors"


def nvfp4_headline(one: Nvfp4) -> str:
    """Size and damage in a sentence."""
    start = f"{one.scheme}: {size(one.size_bytes)} instead of {size(one.source_bytes)} "
    start += f"({change(one.source_bytes, one.size_bytes)})"
    row = None if one.kld is None else one.kld.row(ALL)
    if row is None:
        return f"{start}. What it cost has not been measured."
    return (
        f"{start}, at a cost of {interval(row.mean)} nats per token (mean KLD from {one.against}, n = "
        f"{count(row.mean.n)} chunks); the most likely token stays the same at "
        f"{interval(row.same_top, scale=100)} % of positions."
    )


def part_rows(one: Nvfp4) -> Table:
    """Bytes and weight error of each part, with everything else and the whole behind them."""
    rows = [
        (
            part.part,
            count(part.linears),
            size(part.size_bytes_before),
            size(part.size_bytes),
            f"{8 * part.size_bytes / part.parameters:.3f}",
            f"{part.relative_error:.4f}",
            f"{part.worst[1]:.4f} ({part.worst[0]})",
        )
        for part in one.parts
    ]
    before, after = (sum(getattr(part, name) for part in one.parts) for name in ("size_bytes_before", "size_bytes"))
    rows.append(("everything else", "–", size(one.source_bytes - before), size(one.size_bytes - after), "–", "0", "–"))
    linears = count(sum(part.linears for part in one.parts))
    rows.append(("total", linears, size(one.source_bytes), size(one.size_bytes), "–", "–", "–"))
    columns = ("Part", "Linears", "Before", "After", "Bits per weight", "Weight error, mean", "Weight error, largest")
    return Table(columns, tuple(rows), "lrrrrrl", len(rows) - 1)


def cost_rows(one: Nvfp4) -> Table | None:
    """Damage by class of text, the most first."""
    if one.kld is None:
        return None
    ordered = sorted(one.kld.result.rows, key=lambda row: (row.cls == ALL, -row.mean.value, row.cls))
    rows = tuple(
        (
            "all classes" if row.cls == ALL else row.cls,
            interval(row.mean),
            interval(row.p99),
            interval(row.same_top, scale=100),
            count(row.mean.n),
        )
        for row in ordered
    )
    columns = ("Class", "Mean KLD, nats", "99th percentile, nats", "Same top token, %", "n chunks")
    return Table(columns, rows, "lrrrr", next((i for i, row in enumerate(ordered) if row.cls == ALL), None))


def nvfp4_method(one: Nvfp4) -> tuple[tuple[str, str], ...]:
    """How it was made, as pairs."""
    rows = [("NVFP4", "; ".join(f"{word} {what}" for word, what in one.asked.items()))]
    if (meta := one.observed) is not None:
        rows.append(
            (
                "Scales were told by",
                f"{count(len(meta.questions))} items, {count(meta.tokens)} tokens, at most "
                f"{count(meta.max_tokens_per_item)} of each ({count(meta.truncated_items)} were longer); BOS by "
                f"{meta.bos_policy}; observed in {meta.dtype}",
            )
        )
    rows += [("Linears that stay", f"{count(number)}: {why}") for why, number in one.left.items()]
    if one.borrowed:
        named = ", ".join(one.borrowed[:_NAMED]) + (", …" if len(one.borrowed) > _NAMED else "")
        rows.append(
            (
                "Borrowed scales",
                f"{count(len(one.borrowed))} linears of experts saw too little text and have their peers' activation "
                f"scales: {named}; nvfp4.json lists all of them",
            )
        )
    return tuple(rows)


def nvfp4_limits(one: Nvfp4) -> tuple[str, ...]:
    """What a reader must know before quoting its figures."""
    if one.kld is None:
        return ("The damage of the NVFP4 checkpoint has not been measured on held-out text.",)
    out = [
        "KLD of the NVFP4 checkpoint is that of its numbers, computed here in the arithmetic named above; a server's "
        "kernels round in other places."
    ]
    if one.corpus and one.corpus == one.kld.result.corpus_hash:
        out.append("Scales were chosen and measured on the same corpus: the damage shown is too low.")
    return tuple(out)
