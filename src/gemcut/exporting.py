"""From a checkpoint and file types to GGUF files: layouts, mixes, importances and keys put together, then written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from gemcut import machine, mixing, store
from gemcut.checkpoint import Checkpoint
from gemcut.checkpoint.edited import EditedCheckpoint
from gemcut.errors import MissingError, UsageError
from gemcut.export.imatrix import Imatrix
from gemcut.export.layout import layout_of, vision_layout_of
from gemcut.export.metadata import file_metadata
from gemcut.export.mix import contribution, overrides, padding, sizes, stock
from gemcut.export.output import bytes_to_write, refuse_others
from gemcut.export.provenance import provenance
from gemcut.export.repacked import FILE_TYPES, refuse_other, repack, repacked_types
from gemcut.export.run import SPARE_BYTES, ExportReport, export_gguf
from gemcut.export.source import PIECE_ELEMENTS
from gemcut.export.targets import Importances, Planned, Target, blocks_of, plan_target
from gemcut.families.gguf import GgufLayout, Value
from gemcut.ggml.library import Library, load
from gemcut.ggml.types import BLOCKS, GgmlType
from gemcut.importances import importances_of, refuse_starved
from gemcut.mixing import NOTHING, Mix, MixWords
from gemcut.nvfp4.layout import is_nvfp4
from gemcut.records import load_plan
from gemcut.surgery import cut_for_gguf

Progress = Callable[[int, int, str], None]
_BASE_MEMORY_BYTES = 200 << 20  # the interpreter, numpy and the library
_HEADER_COPIES = 16  # a vocabulary as Python strings, and as bytes once for each file


@dataclass(frozen=True, slots=True)
class GgufWords:
    """What is asked for.

    types: file types and ContribDynamic tiers of the model file.   mix: sizes and cards to solve for.
    overrides: `REGEX=TYPE`, over each of them.   projectors: types of mmproj files.   imatrix: its file.
    max_shard_bytes: payload of a part; None for files in one piece.   pad_experts: see `mix.padding`.
    """

    types: tuple[str, ...]
    imatrix: Path | None = None
    overrides: tuple[str, ...] = ()
    max_shard_bytes: int | None = None
    projectors: tuple[str, ...] = ()
    mix: MixWords = NOTHING
    pad_experts: bool = False


@dataclass(frozen=True, slots=True)
class FileCost:
    """One file before it is written.

    kinds: by role of tensor, largest first.   bound: how sure the size is; "exact" is to the byte.
    """

    name: str
    parts: int
    size_bytes: int
    bits_per_weight: float
    kinds: tuple[sizes.KindSize, ...]
    bound: Literal["exact", "at most", "about"] = "exact"


@dataclass(frozen=True, slots=True)
class GgufPreflight:
    """What an export would read, write and need."""

    files: tuple[FileCost, ...]
    read_bytes: int
    write_bytes: int
    free_bytes: int
    memory_bytes: int
    available_bytes: int
    threads: int


@dataclass(frozen=True, eq=False)
class Export:
    """One layout of a checkpoint and the files that hold it.   mixes: why the solved ones are as they are."""

    checkpoint: Checkpoint
    layout: GgufLayout
    planned: tuple[Planned, ...]
    mixes: tuple[Mix, ...] = ()

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of the source."""
        sources = [tensor.source for tensor in self.layout.tensors if tensor.source is not None]
        return sum(self.checkpoint.ref(name).size_bytes for name in sources)


@dataclass(slots=True)
class _Files:
    """Names and keys of the files of one checkpoint."""

    checkpoint: Checkpoint
    library: Library
    words: GgufWords
    imatrix: Imatrix | None
    importances: Importances | None
    _keys: dict[str, Mapping[str, Value]] = field(default_factory=dict)

    def plan(self, layout: GgufLayout, file_name: str, types: Mapping[str, GgmlType], number: int) -> Planned:
        """One file laid out."""
        base, parent = self.checkpoint, self.checkpoint.fingerprint
        whole = base.base.fingerprint if isinstance(base, EditedCheckpoint) else parent
        keys = self._keys.get(layout.architecture)  # the vocabulary is read once for all files
        if keys is None:
            name = file_stem(base) if ":" in base.name else base.name  # demo:moe is a reference, no name
            keys = file_metadata(base.path, base.config, layout, name=name, file_type=number)
            self._keys[layout.architecture] = keys
        file = self.words.imatrix.name if self.words.imatrix is not None else ""
        metadata = {
            **keys,
            "general.file_type": Value("u32", number),
            **provenance(whole, self.library.identity, self.imatrix, file, cut=parent if whole != parent else ""),
        }
        target = Target(file_name, types, metadata, self.importances)
        return plan_target(
            target, layout, parent=parent, quantiser=self.library.identity, max_shard_bytes=self.words.max_shard_bytes
        )

    def header_bytes(self, layout: GgufLayout) -> int:
        """Bytes before the payload, of all parts; types do not change them."""
        types = stock.stock_types("Q8_0", layout, imatrix=False)
        return sum(part.data_start for part in self.plan(layout, "trial.gguf", types, 0).parts)


def plan_export(
    checkpoint: Checkpoint,
    words: GgufWords,
    library: Library | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[Export, ...]:
    """Everything decided, no model written; a solved mix keeps the damages it measured where `words.mix` says.

    Args:
        threads, progress: of measuring damages.
    Raises:
        UsageError: an unknown type, a pattern that binds nothing, a type that needs importances without them, a size
            that cannot be had.
        CheckpointError: the imatrix is damaged or of another model; the tokenizer cannot be written.
        MissingError: the quantisers' library is not installed.
    """
    if not words.types and not words.projectors and not words.mix.asked:
        raise UsageError("no file type was asked for", hint=f"-t {', -t '.join(('Q4_K_M', 'IQ3_M'))}")
    library = load() if library is None else library
    given = overrides.parse_overrides(words.overrides)
    exports: list[Export] = []
    if (words.types or words.mix.asked) and is_nvfp4(checkpoint.config):
        exports += _repacked(checkpoint, words, given, library)
    elif words.types or words.mix.asked:
        layout = layout_of(checkpoint)
        imatrix = None if words.imatrix is None else importances_of(words.imatrix, layout, checkpoint)
        exports.append(
            _plan_model(checkpoint, layout, words, given, imatrix, library, threads=threads, progress=progress)
        )
    if words.projectors:
        layout = vision_layout_of(checkpoint)
        files = _Files(checkpoint, library, GgufWords((), max_shard_bytes=None), None, None)
        planned = []
        for kind in dict.fromkeys(stock.file_type(name) for name in words.projectors):
            name = f"mmproj-{file_stem(checkpoint)}-{kind.name}.gguf"
            planned.append(files.plan(layout, name, mixing.projector_types(layout, kind.base), kind.number))
        exports.append(Export(checkpoint, layout, tuple(planned)))
    return tuple(exports)


def _plan_model(
    checkpoint: Checkpoint,
    layout: GgufLayout,
    words: GgufWords,
    given: Sequence[overrides.Override],
    imatrix: Imatrix | None,
    library: Library,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Export:
    """The model's own files: of types and tiers, then of solved mixes."""
    importances: Importances | None = imatrix
    stem, planned, suffix = file_stem(checkpoint), [], ""
    if words.pad_experts:
        layout, suffix = padding.pad_experts(layout), padding.SUFFIX
        importances = None if imatrix is None else padding.PaddedImportances.of(imatrix, layout)
    files = _Files(checkpoint, library, words, imatrix, importances)
    for asked in dict.fromkeys(name.strip().upper() for name in words.types):
        types, number = _types(asked, layout, imatrix, given)
        planned.append(files.plan(layout, f"{stem}-{asked}{suffix}.gguf", types, number))
    mixes: tuple[Mix, ...] = ()
    if words.mix.asked:
        mixes = mixing.solve_mixes(
            checkpoint, layout, words.mix, importances, files.header_bytes(layout),
            by_hand=given, threads=threads, library=library, progress=progress,
        )  # fmt: skip
        for mix in mixes:
            planned.append(files.plan(layout, f"{stem}-{mix.name}{suffix}.gguf", mix.solution.types, mix.number))
    return Export(checkpoint, layout, tuple(planned), mixes)


def _repacked(
    checkpoint: Checkpoint, words: GgufWords, given: Sequence[overrides.Override], library: Library
) -> list[Export]:
    """Files of an NVFP4 checkpoint; each has tensors of its own."""
    beside = {"--imatrix": words.imatrix is not None, "--pad-experts": words.pad_experts, "--size": words.mix.asked}
    types = tuple(dict.fromkeys(name.strip().upper() for name in words.types))
    refuse_other(types, beside)
    exports = []
    for asked in types:
        view, layout = repack(checkpoint, asked)
        name, kinds = f"{file_stem(checkpoint)}-{asked}.gguf", repacked_types(view, layout, given)
        planned = _Files(view, library, words, None, None).plan(layout, name, kinds, FILE_TYPES[asked])
        exports.append(Export(view, layout, (planned,)))
    return exports


def _types(
    asked: str, layout: GgufLayout, imatrix: Imatrix | None, given: Sequence[overrides.Override]
) -> tuple[dict[str, GgmlType], int]:
    """Types of a file type or a ContribDynamic tier, and `general.file_type`."""
    if asked.startswith("CD-"):
        kind = stock.file_type(contribution.tier(asked).plain)
        types = mixing.tier_types(asked, layout, imatrix) | overrides.decided(layout, given)
    else:
        kind = stock.file_type(asked)
        types = stock.stock_types(asked, layout, imatrix=imatrix is not None, overrides=given)
    refuse_starved(asked, kind.name, types, imatrix)
    return types, kind.number


def after_plan(base: Checkpoint, plan_file: Path, healed: Path | None = None) -> Checkpoint:
    """The model as the plan leaves it, read from the base and never written. The plan may keep other numbers of heads
    in every layer: a GGUF file can say that, a config.json cannot.

    Raises:
        UsageError, CheckpointError: the plan does not fit the model.
    """
    return cut_for_gguf(base, load_plan(plan_file), healed)


def file_stem(checkpoint: Checkpoint) -> str:
    """What files of this checkpoint are called: the last part of its name, in letters that every system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"


def costs_of(exports: Sequence[Export]) -> list[FileCost]:
    """What each planned file weighs, to the byte."""
    files = []
    for export in exports:
        for plan in export.planned:
            header = plan.parts[0].data_start
            kinds = sizes.file_size(header, plan.target.types, export.layout).kinds
            files.append(FileCost(plan.target.name, len(plan.parts), plan.size_bytes, plan.bits_per_weight, kinds))
    return files


def presumed_costs(
    checkpoint: Checkpoint, words: GgufWords, library: Library, imatrix: Imatrix | None
) -> tuple[list[FileCost], GgufLayout]:
    """Files of `words.types` before there is an importance matrix, and their layout.

    To the byte; but for ContribDynamic tiers where layers differ, since the importances choose among them, and for a
    cut, whose name stands in the file: these are marked.

    Args:
        imatrix: `imatrix.presumed`; None: there will be none.
    Raises:
        UsageError: an unknown type or tier, a pattern that binds nothing, or a type that needs importances.
    """
    given, layout = overrides.parse_overrides(words.overrides), layout_of(checkpoint)
    export = _plan_model(checkpoint, layout, replace(words, mix=NOTHING), given, imatrix, library)
    cut, alike = isinstance(checkpoint, EditedCheckpoint), contribution.layers_alike(export.layout)
    found = [
        replace(one, bound="about") if cut or ("-CD-" in one.name and not alike) else one for one in costs_of([export])
    ]
    return found, export.layout


def presumed_header_bytes(
    checkpoint: Checkpoint, layout: GgufLayout, words: GgufWords, library: Library, imatrix: Imatrix | None
) -> int:
    """What a file of this layout has before its payload; arguments as of `presumed_costs`."""
    return _Files(checkpoint, library, words, imatrix, None).header_bytes(layout)


def estimate(exports: Sequence[Export], out: Path, threads: int, *, force: bool = False) -> GgufPreflight:
    """Sizes to the byte, and a refusal of what cannot finish.

    Raises:
        MissingError: the disk or the memory is too small.
        UsageError: another file has the name of one of these, and not `force`.
    """
    files = costs_of(exports)
    for plan in () if force else (plan for export in exports for plan in export.planned):
        refuse_others(plan, out)
    write = sum(bytes_to_write(plan, out, force=force) for export in exports for plan in export.planned)
    headers = sum(part.data_start for export in exports for plan in export.planned for part in plan.parts)
    memory = _BASE_MEMORY_BYTES + _HEADER_COPIES * headers // max(len(files), 1) + headers
    memory += threads * (8 * PIECE_ELEMENTS * 4 + max((_picking_bytes(one) for one in exports), default=0))
    found = GgufPreflight(
        tuple(files), sum(one.read_bytes for one in exports), write, store.free_bytes(out), memory,
        machine.available_bytes(), threads,
    )  # fmt: skip
    store.need_disk(out, write + SPARE_BYTES)
    if found.memory_bytes > found.available_bytes:
        raise MissingError(
            "not enough memory",
            got=f"{found.available_bytes >> 20} MiB available",
            wanted=f"{found.memory_bytes >> 20} MiB",
            hint="fewer --threads",
        )
    return found


def _picking_bytes(export: Export) -> int:
    """What a thread holds of one piece while blocks are picked: K payloads, three sums of each block, four float32
    arrays of the weights' shape; 0 where nothing is picked."""
    most = 0
    for plan in export.planned:
        for tensor in export.layout.tensors:
            if not plan.importance[tensor.name]:
                continue
            picked = blocks_of(plan.target, tensor, 0)
            if picked is None:
                continue
            block = BLOCKS[plan.target.types[tensor.name]]
            each = len(picked.importances) * (block.size_bytes + 12)
            most = max(most, PIECE_ELEMENTS // block.values * each + 16 * PIECE_ELEMENTS)
    return most


def write_export(
    exports: Sequence[Export],
    out: Path,
    *,
    threads: int,
    force: bool = False,
    library: Library | None = None,
    progress: Progress | None = None,
) -> tuple[ExportReport, ...]:
    """Write every file of every layout; see `export_gguf`."""
    return tuple(
        export_gguf(
            one.checkpoint,
            one.layout,
            one.planned,
            out,
            threads=threads,
            force=force,
            library=library,
            progress=progress,
        )
        for one in exports
    )
