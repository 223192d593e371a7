"""Which mixes an export is asked for beyond the file types: a size, a card's memory, a ContribDynamic tier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemcut.checkpoint import Checkpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix import Imatrix
from gemcut.export.layout import vision_layout_of
from gemcut.export.mix import contribution, fit, measure, overrides, shapes, solver, stock
from gemcut.export.mix.explain import Band, Choice, bands, choices
from gemcut.export.mix.sizes import file_size, stored_bytes
from gemcut.export.targets import Importances
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.library import Library
from gemcut.ggml.types import GgmlType, parse_type
from gemcut.gguf_file import open_gguf
from gemcut.models import is_gguf
from gemcut.records.curvature import load_curvature
from gemcut.store import write_bytes
from gemcut.types import Json

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
DAMAGES_FILE = "damages.json"
_UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6, "KiB": 1 << 10, "KB": 1000}
MMPROJ, DRAFTER = "mmproj", "drafter"


@dataclass(frozen=True, slots=True)
class FitWords:
    """A card. memory_bytes: all of it.   others: files that lie in it beside the model, name → bytes."""

    memory_bytes: int
    context: int
    cache: GgmlType = GgmlType.F16
    others: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class MixWords:
    """sizes: bytes of files to solve for.   fits: cards to solve for.

    curvature: its folder.   damages: the file where measured damages are looked for, and kept if `keep`.
    """

    sizes: tuple[int, ...] = ()
    fits: tuple[FitWords, ...] = ()
    curvature: Path | None = None
    damages: Path | None = None
    keep: bool = True

    @property
    def asked(self) -> bool:
        return bool(self.sizes or self.fits)


NOTHING = MixWords()


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a file may have.   name: for the file.   fit: of a card, where they come from."""

    name: str
    size_bytes: int
    fit: fit.Fit | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """A solved mix and why it is so.   name: for the file.   number: `general.file_type` of the nearest stock file."""

    name: str
    number: int
    solution: solver.Solution
    fit: fit.Fit | None
    bands: tuple[Band, ...]
    choices: tuple[Choice, ...]

    def summary(self) -> dict[str, Json]:
        """The figures, for a record."""
        found = self.solution
        terms = self.fit.terms if self.fit is not None else ()
        return {
            "name": self.name,
            "size_bytes": found.size_bytes,
            "budget_bytes": found.budget_bytes,
            "least_bytes": found.least_bytes,
            "most_bytes": found.most_bytes,
            "expected_kld": found.damage,
            "memory": {term.name: term.size_bytes for term in terms},
        }


def tier_types(name: str, layout: GgufLayout, imatrix: Imatrix | None) -> dict[str, GgmlType]:
    """Types of a ContribDynamic tier; the layers' contributions come from the importance matrix.

    Raises:
        UsageError: no importance matrix; see `contribution.tier_types`.
    """
    if imatrix is None:
        raise UsageError(f"{name} ranks layers by an importance matrix", hint="make one with gemcut imatrix: --imatrix")
    energies = {
        tensor: float((entry.sums.astype("f8").sum()) / max(1, int(entry.counts.sum())))
        for tensor, entry in imatrix.entries.items()
    }
    return contribution.tier_types(name, layout, contribution.contribution_of(layout, energies))


def solve_mixes(
    checkpoint: Checkpoint,
    layout: GgufLayout,
    words: MixWords,
    importances: Importances | None,
    header_bytes: int,
    *,
    by_hand: Sequence[overrides.Override] = (),
    threads: int = 1,
    library: Library | None = None,
    progress: Progress | None = None,
) -> tuple[Mix, ...]:
    """The best types for each size and card; damages are measured once for all of them.

    Args:
        header_bytes: of the file, up to the first tensor's data.
        by_hand: tensors whose types are decided.
    Raises:
        UsageError: no curvature; a size below the least possible; a card that holds nothing. Before anything is
            measured.
        CheckpointError: the curvature is damaged or of another model.
    """
    if words.curvature is None:
        raise UsageError(
            "a size is solved by what each tensor's rounding costs", hint="make it with gemcut curvature: --curvature"
        )
    fixed = overrides.decided(layout, by_hand)
    budgets = budgets_of(layout, words)
    solvable(layout, budgets, header_bytes, importances, fixed)
    earlier = measure.load_damages(words.damages) if words.damages is not None and words.damages.exists() else None
    if earlier is None and not words.keep:
        log.warning("every type of every tensor is measured now; a dry run keeps nothing, the run will measure again")
    damages = measure.measure_damages(
        checkpoint, layout, load_curvature(words.curvature), importances,
        earlier=earlier, threads=threads, library=library, progress=progress,
    )  # fmt: skip
    if words.damages is not None and words.keep and damages.values != (earlier.values if earlier else None):
        words.damages.parent.mkdir(parents=True, exist_ok=True)
        measure.save_damages(damages, words.damages)
    mixes = []
    for one in budgets:
        solution = solver.solve(layout, damages.values, one.size_bytes, header_bytes=header_bytes, fixed=fixed)
        number = _nearest(layout, solution, header_bytes, imatrix=importances is not None)
        shown = bands(layout, solution.types, damages.values), choices(layout, solution.types, damages.values)
        mixes.append(Mix(one.name, number, solution, one.fit, *shown))
    return tuple(mixes)


def budgets_of(layout: GgufLayout, words: MixWords) -> list[Budget]:
    """What each size and card leaves for a file. Raises as `fit.weights_budget`."""
    found = [Budget(size_name(size), size) for size in dict.fromkeys(words.sizes)]
    for one in dict.fromkeys(words.fits):
        left = fit.weights_budget(
            layout, one.memory_bytes, context=one.context, cache=one.cache, others=dict(one.others)
        )
        found.append(Budget(f"fit-{size_name(one.memory_bytes)}", left.weights_bytes, left))
    return found


def solvable(
    layout: GgufLayout,
    budgets: Sequence[Budget],
    header_bytes: int,
    importances: Importances | None,
    fixed: Mapping[str, GgmlType],
) -> tuple[int, int]:
    """Bytes of the smallest and of the largest file that the solver could choose.

    Args:
        importances: only which tensors have some is asked.
        fixed: tensors whose types are decided.
    Raises:
        UsageError: a budget is below the smallest; no type of a mix fits a tensor.
    """
    least = most = header_bytes
    for tensor in layout.tensors:
        if tensor.name in fixed or not shapes.quantisable(tensor):
            kinds = [fixed.get(tensor.name, shapes.unquantised_type(tensor))]
        else:
            weighed = importances is not None and importances.importance(tensor.name) is not None
            kinds = measure.allowed(tensor, measure.CANDIDATES, with_importances=weighed)
        sizes = [stored_bytes(kind, tensor) for kind in kinds]
        least, most = least + min(sizes), most + max(sizes)
    for one in budgets:
        solver.refuse_small(layout, one.size_bytes, least, importances=importances is not None, where=one.name)
    return least, most


def card_words(
    checkpoint: Checkpoint,
    memory_bytes: int,
    context: int,
    cache: str,
    beside: Sequence[str] = (),
    *,
    projector: str = "Q8_0",
    drafter_bytes: int | None = None,
) -> FitWords:
    """A card in the words of the command line and of recipes.

    Args:
        beside: `mmproj` (this checkpoint's, of the type `projector`), `drafter`, and paths of GGUF files.
        drafter_bytes: size of the drafter's file; None where there is none.
    Raises:
        UsageError: no such type, no such file, no vision tower, or no drafter.
    """
    others = []
    for word in beside:
        if word == DRAFTER and drafter_bytes is not None:
            others.append((DRAFTER, drafter_bytes))
        elif word == DRAFTER:
            raise UsageError("a drafter lies beside the model, and none is named", got=word, hint="--drafter MODEL")
        elif word == MMPROJ:
            layout = vision_layout_of(checkpoint)
            kind = stock.file_type(projector).base
            others.append((MMPROJ, file_size(0, projector_types(layout, kind), layout).size_bytes))
        elif Path(word).is_file():
            file = Path(word)
            others.append((file.name, open_gguf(file).size_bytes if is_gguf(word) else file.stat().st_size))
        else:
            raise UsageError(
                "nothing that could lie beside the model", got=word, wanted=f"{MMPROJ}, {DRAFTER} or a GGUF file"
            )
    return FitWords(memory_bytes, context, parse_type(cache), tuple(others))


def projector_types(layout: GgufLayout, kind: GgmlType) -> dict[str, GgmlType]:
    """One type for every matrix of an mmproj file, as the converter's --outtype has it; F16 where it does not fit."""
    return {
        tensor.name: shapes.shaped(kind, tensor)
        if shapes.quantisable(tensor)
        else shapes.unquantised_type(tensor, kind)
        for tensor in layout.tensors
    }


def save_picture(mix: Mix, path: Path) -> None:
    """Where the bits are, as SVG."""
    from gemcut.report.bits import Cell, bits  # matplotlib takes most of a second

    cells = [Cell(one.role, one.layer, one.bpw, one.kind.name, one.elements) for one in mix.choices]
    drawing = bits(cells, mix.name)
    if drawing is not None:
        write_bytes(path, drawing.svg.encode())


def size_name(size_bytes: int) -> str:
    """`10GiB`, `3.5MB`, `5200123B`: a size in a file's name, as short as it can be without meaning another size."""
    found = [f"{size_bytes}B"]
    for unit, scale in _UNITS.items():
        for digits in range(4) if size_bytes >= scale else ():
            number = f"{size_bytes / scale:.{digits}f}"
            if int(float(number) * scale) == size_bytes:
                found.append(number + unit)
                break
    return min(found, key=lambda name: sum(c.isdecimal() for c in name))


def _nearest(layout: GgufLayout, solution: solver.Solution, header_bytes: int, *, imatrix: bool) -> int:
    """`general.file_type` of the stock file nearest in size: what other programs show."""

    def distance(name: str) -> int:
        types = stock.stock_types(name, layout, imatrix=imatrix)
        return abs(file_size(header_bytes, types, layout).size_bytes - solution.size_bytes)

    shown = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS")
    return stock.file_type(min(shown, key=distance)).number
