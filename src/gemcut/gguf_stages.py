"""GGUF files from a recipe's words: the verb and the pipeline alike plan, write and measure by these."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import comparing, exporting, imatrices, machine, mixing, models, store
from gemcut.checkpoint import Checkpoint
from gemcut.errors import GemcutError, UsageError
from gemcut.export.imatrix import coverage, fit, gate, read_imatrix
from gemcut.export.layout import layout_of
from gemcut.export.mix.contribution import TIERS
from gemcut.export.record import load_record, record_path
from gemcut.export.run import ExportReport
from gemcut.export.targets import Planned
from gemcut.exporting import Export
from gemcut.families import is_drafter
from gemcut.gguf_file.header import GgufFile, open_gguf
from gemcut.recipe import CurvatureWords, GgufWords, ImatrixWords, Measure
from gemcut.records.curvature import save_curvature
from gemcut.types import Json, KldResult
from gemcut.vocabulary import size_bytes

if TYPE_CHECKING:
    from gemcut.stream.corpus import Corpus

Progress = Callable[[int, int, str], None]

IMATRIX = "imatrix.gguf"  # inside the imatrix stage's folder
CURVATURE = "curvature"  # inside the curvature stage's
FILES = "files"  # inside the gguf stage's
FACTS = "files.json"  # beside it: what the report says of them
SUMS = "SHA256SUMS"
MODEL, MMPROJ, DRAFTER = "model", "mmproj", "drafter"


@dataclass(frozen=True, slots=True)
class Written:
    """One file as the report names it.

    role: model, mmproj or drafter.   asked: Q4_K_M, CD-Q3_K_M, 5.5MiB, fit-24GiB.   how: stock, layers, size or card.
    imatrix: the variant that entered its bytes, "" for none.   memory: of a card, parts → bytes.
    expected: KLD that the solver expects, None where nothing was solved.
    """

    name: str
    role: str
    asked: str
    how: str
    parts: tuple[str, ...]
    size_bytes: int
    bits_per_weight: float
    imatrix: str
    types: Mapping[str, int]
    sha256: Mapping[str, str]
    memory: Mapping[str, int] = field(default_factory=dict)
    expected: float | None = None

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".gguf")


@dataclass(frozen=True, slots=True)
class Quantised:
    """What the stages left. measured: by the files' names without ending; the floor under its own name.

    folder: of the files.
    """

    model: Checkpoint
    folder: Path
    files: tuple[Written, ...]
    measured: dict[str, KldResult] = field(default_factory=dict)


# ---------------------------------------------------------------- what sizes and small types stand on


def imatrix(
    statistics: Path, base: Checkpoint, words: ImatrixWords, out: Path, *, progress: Progress | None = None
) -> imatrices.ImatrixReport:
    """Importances from an observation, with the record of their coverage beside them."""
    asked = imatrices.words_of(words.variant, words.target, words.prior, (), words.roundings)
    made, layout, choices = imatrices.from_observation(statistics, base, asked, progress=progress)
    return imatrices.save(made, layout, choices, asked, out, force=True)


def imatrix_gate(file: Path, base: Checkpoint) -> None:
    """QualityError where the text starved too many experts of a layer; the file stays."""
    layout = layout_of(base)
    gate(coverage(fit(read_imatrix(file), layout), layout))


def curvature(
    base: Checkpoint,
    corpus: Corpus,
    words: CurvatureWords,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Squared gradients of every weight, forward and backward once; what was summed, for people."""
    from gemcut import ablate

    settings = ablate.AblateSettings(device=words.device, dtype=None if words.dtype == "auto" else words.dtype)
    found = ablate.curvature(base, corpus, settings, draws=words.draws, seed=words.seed, progress=progress)
    save_curvature(found, out, force=force)
    return {"tensors": len(found.tensors), "tokens": found.tokens, "items": found.items, "draws": found.draws}


# ---------------------------------------------------------------- files


def plan_files(
    base: Checkpoint,
    words: GgufWords,
    *,
    imatrix: Path | None = None,
    curvature: Path | None = None,
    damages: Path | None = None,
    keep: bool = True,
    progress: Progress | None = None,
) -> tuple[Export, ...]:
    """Every file decided and laid out; no model is written.

    Args:
        damages: file of measured damages, read, and written if `keep`.
    Raises:
        As `exporting.plan_export`; UsageError for a drafter that is none.
    """
    drafters: tuple[Export, ...] = ()
    threads = words.threads or machine.cores()
    if words.drafter is not None:
        drafter = models.open_exportable(words.drafter.model)
        _check_drafter(drafter, base)
        drafters = exporting.plan_export(drafter, exporting.GgufWords(words.drafter.tiers), threads=threads)
    drafter_bytes = drafters[0].planned[0].size_bytes if drafters else None
    mix = mixing.MixWords(sizes(words), cards(base, words, drafter_bytes), curvature, damages, keep)
    asked = exporting.GgufWords(
        words.tiers,
        imatrix,
        words.overrides,
        None if words.max_shard_size is None else size_bytes(words.max_shard_size),
        words.mmproj,
        mix,
        words.pad_experts,
    )
    if not (words.tiers or words.mmproj or mix.asked):
        return drafters
    exports = (*exporting.plan_export(base, asked, threads=threads, progress=progress), *drafters)
    names = [plan.target.name for export in exports for plan in export.planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            "two files would have one name", got=twice[0], hint="model and drafter are called alike: rename a folder"
        )
    return exports


def sizes(words: GgufWords) -> tuple[int, ...]:
    """Bytes of the files to solve for, each once: 1GiB is 1024MiB."""
    return tuple(dict.fromkeys(size_bytes(one) for one in words.sizes))


def cards(base: Checkpoint, words: GgufWords, drafter_bytes: int | None) -> tuple[mixing.FitWords, ...]:
    """The cards to solve for, each once.

    Args:
        drafter_bytes: size of the drafter's file; None where there is none.
    Raises:
        UsageError: two cards of one memory, by which their files are called; and as `mixing.card_words`.
    """
    found: dict[int, mixing.FitWords] = {}
    for one in words.fit:
        card = mixing.card_words(
            base, size_bytes(one.memory), one.context, one.kv, one.beside,
            projector=next(iter(words.mmproj), "Q8_0"), drafter_bytes=drafter_bytes,
        )  # fmt: skip
        first = found.setdefault(card.memory_bytes, card)
        if card != first:
            raise UsageError(
                "two files would have one name: a card's file is called by its memory alone",
                where=f"fit-{mixing.size_name(card.memory_bytes)}",
                got=f"{_card_text(first)}, and {_card_text(card)}",
                hint="keep the card that leaves less for the weights, its file fits the other, too; or write the other "
                "by a recipe of another name",
            )
    return tuple(found.values())


def _card_text(card: mixing.FitWords) -> str:
    beside = "".join(f" beside {name}" for name, _ in card.others)
    return f"context {card.context} in {card.cache.name.lower()}{beside}"


def _check_drafter(drafter: Checkpoint, base: Checkpoint) -> None:
    wide, backbone = base.text_config.get("hidden_size"), drafter.config.get("backbone_hidden_size")
    if not is_drafter(drafter.config):
        raise UsageError("this model is no drafter", where=drafter.name, wanted="gemma4_assistant")
    if backbone != wide:
        raise UsageError(
            "the drafter was made for another model", where=drafter.name, got=f"backbone_hidden_size {backbone}",
            wanted=wide,
        )  # fmt: skip


def write_files(
    exports: Sequence[Export],
    words: GgufWords,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[ExportReport, ...]:
    """Write every file, and beside each solved one a picture of its bits."""
    reports = exporting.write_export(
        exports, out, threads=words.threads or machine.cores(), force=force, progress=progress
    )
    for export in exports:
        for plan, mix in _solved(export):
            mixing.save_picture(mix, out / f"{plan.target.name.removesuffix('.gguf')}.bits.svg")
    return reports


def _solved(export: Export) -> list[tuple[Planned, mixing.Mix]]:
    """Solved mixes stand behind the tiers."""
    return list(zip(export.planned[len(export.planned) - len(export.mixes) :], export.mixes, strict=True))


def link_earlier(exports: Sequence[Export], out: Path, folders: Sequence[Path]) -> list[str]:
    """Files of earlier exports that are the very ones asked for, linked into `out`; their names."""
    found = []
    for plan in (plan for export in exports for plan in export.planned):
        for folder in folders:
            with contextlib.suppress(GemcutError, OSError):
                same = load_record(record_path(folder, plan.target.name)).settings == plan.settings
                names = [part.name for part in plan.parts]
                if not same or any((out / name).exists() for name in names):
                    continue
                out.mkdir(parents=True, exist_ok=True)
                for name in (*names, record_path(out, plan.target.name).name):
                    os.link(folder / name, out / name)
                found.append(plan.target.name)
                break
    return found


def written(exports: Sequence[Export], out: Path, imatrix: Path | None) -> tuple[Written, ...]:
    """What was written, read back from the files' own headers and bytes."""
    variant = read_imatrix(imatrix).variant if imatrix is not None else ""
    facts = []
    for export in exports:
        solved = {plan.target.name: mix for plan, mix in _solved(export)}
        role = {"clip": MMPROJ}.get(export.layout.architecture, MODEL)
        if export.layout.architecture.endswith("assistant"):
            role = DRAFTER
        for plan in export.planned:
            file = open_gguf(out / plan.parts[0].name)
            mix = solved.get(plan.target.name)
            facts.append(
                Written(
                    name=plan.target.name,
                    role=role,
                    asked=plan.target.name.removesuffix(".gguf").removeprefix(_stem(export, role)),
                    how=_how(plan.target.name, mix),
                    parts=file.parts,
                    size_bytes=file.size_bytes,
                    bits_per_weight=plan.bits_per_weight,
                    imatrix=variant if any(plan.importance.values()) else "",
                    types=_types(file),
                    sha256={name: store.sha256_file(out / name) for name in file.parts},
                    memory={term.name: term.size_bytes for term in mix.fit.terms} if mix and mix.fit else {},
                    expected=None if mix is None else mix.solution.damage,
                )
            )
    return tuple(facts)


def _stem(export: Export, role: str) -> str:
    return f"{'mmproj-' if role == MMPROJ else ''}{exporting.file_stem(export.checkpoint)}-"


def _how(name: str, mix: mixing.Mix | None) -> str:
    if mix is not None:
        return "card" if mix.fit is not None else "size"
    return "layers" if any(f"-{tier}" in name for tier in TIERS) else "stock"


def _types(file: GgufFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for ref in file.tensors.values():
        counts[ref.kind.name] = counts.get(ref.kind.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def save_facts(facts: Sequence[Written], folder: Path) -> None:
    """SHA256SUMS beside the files, and what the report says of them, last."""
    lines = [f"{digest}  {name}\n" for one in facts for name, digest in sorted(one.sha256.items())]
    store.write_bytes(folder / FILES / SUMS, "".join(lines).encode())
    store.write_json(folder / FACTS, {"schema": 1, "files": [_to_json(one) for one in facts]})


def _to_json(one: Written) -> dict[str, object]:
    return {
        "name": one.name, "role": one.role, "asked": one.asked, "how": one.how, "parts": list(one.parts),
        "size_bytes": one.size_bytes, "bits_per_weight": one.bits_per_weight, "imatrix": one.imatrix,
        "types": dict(one.types), "sha256": dict(one.sha256), "memory": dict(one.memory), "expected": one.expected,
    }  # fmt: skip


def load_facts(folder: Path) -> tuple[Written, ...]:
    """What `save_facts` kept."""
    listed = store.read_json(folder / FACTS, "record of GGUF files")["files"]
    assert isinstance(listed, list)
    return tuple(_from_json(one) for one in listed if isinstance(one, dict))


def _from_json(one: Mapping[str, Json]) -> Written:
    def numbers(key: str) -> dict[str, int]:
        value = one[key]
        return {name: int(str(n)) for name, n in value.items()} if isinstance(value, dict) else {}

    def texts(key: str) -> tuple[str, ...]:
        value = one[key]
        return tuple(map(str, value)) if isinstance(value, list) else ()

    sums, expected = one["sha256"], one["expected"]
    return Written(
        name=str(one["name"]),
        role=str(one["role"]),
        asked=str(one["asked"]),
        how=str(one["how"]),
        parts=texts("parts"),
        size_bytes=int(str(one["size_bytes"])),
        bits_per_weight=float(str(one["bits_per_weight"])),
        imatrix=str(one["imatrix"]),
        types=numbers("types"),
        sha256={name: str(digest) for name, digest in sums.items()} if isinstance(sums, dict) else {},
        memory=numbers("memory"),
        expected=None if expected is None else float(str(expected)),
    )


# ---------------------------------------------------------------- damage


def kld(
    base: Checkpoint,
    files: Mapping[str, Path],
    corpus: Corpus,
    words: Measure,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, KldResult]:
    """The base folder against every file, and against its own BF16 file where a floor is asked for."""
    if not files:
        raise UsageError("there is no GGUF file to measure")
    compared = comparing.Comparison(base, {name: open_gguf(path) for name, path in files.items()}, base.path)
    with contextlib.ExitStack() as stack:
        if words.floor:
            compared = stack.enter_context(comparing.with_floor(compared, folder, progress=progress))
        return comparing.measure(compared, corpus, words, folder, progress=progress)
