"""NVFP4 checkpoints from a recipe's words: the verb and the pipeline alike write, verify and describe by these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import machine, records, shipped, stages, store
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.export.nvfp4.choice import choose
from gemcut.export.nvfp4.record import RECORD
from gemcut.nvfp4.layout import tensors_of
from gemcut.recipe import Nvfp4Words
from gemcut.serve import ServeWords, Serving, serving
from gemcut.types import DTYPE_BYTES, Json, KldResult

if TYPE_CHECKING:
    from gemcut.export.nvfp4.check import Nvfp4Verified
    from gemcut.export.nvfp4.run import Nvfp4Report, Settings
    from gemcut.records.canary import CanaryResult
    from gemcut.report import Check, ModelFacts, Nvfp4, Nvfp4Part

Progress = Callable[[int, int, str], None]

MODEL = "model"  # inside the nvfp4 stage's folder
ASKED = ("scales", "activations", "targets", "kv", "layout")  # words of the record that a report repeats


@dataclass(frozen=True, slots=True)
class Packed:
    """What the stages left.

    parent: what was quantised.   statistics: what its scales were told by.   measured: against the recipe's base.
    """

    folder: Path
    name: str
    parent: Checkpoint
    statistics: Path | None
    drafter: str | None
    checks: tuple[Check, ...] = ()
    canary: CanaryResult | None = None
    measured: KldResult | None = None

    def open(self) -> Checkpoint:
        """The folder under the name that it is published by."""
        return open_checkpoint(self.folder, self.name, any_architecture=True)


def settings(words: Nvfp4Words) -> Settings:
    """The room's settings from the recipe's words."""
    from gemcut.export.nvfp4.run import Settings

    return Settings(
        scheme=words.scheme,
        targets=words.targets,
        scales=words.scales or "",
        layout=words.layout,
        activations=words.activations,
        kv=words.kv,
        ignore=words.ignore,
        narrow=words.narrow,
        device=words.device,
        max_borrowed=words.max_borrowed,
        threads=words.threads or machine.free_cores(),
    )


def export(
    model: Checkpoint,
    words: Nvfp4Words,
    statistics: Path | None,
    out: Path,
    *,
    force: bool = False,
    link: bool = True,
    progress: Progress | None = None,
) -> Nvfp4Report:
    """Write the folder. Raises as `prepare` and `write_nvfp4` do."""
    from gemcut.export.nvfp4.run import prepare, write_nvfp4

    prepared = prepare(model, settings(words), statistics)
    return write_nvfp4(prepared, out, force=force, link=link, progress=progress)


def verified(folder: Path, parent: Checkpoint, out: Path, *, progress: Progress | None = None) -> None:
    """`verify_nvfp4`, with its answer kept for the report."""
    from gemcut.export.nvfp4.check import verify_nvfp4

    found = verify_nvfp4(open_checkpoint(folder, any_architecture=True), parent, progress=progress)
    stages.save_checks(checks(found), out)


def checks(found: Nvfp4Verified) -> list[Check]:
    """What a passed verification rests on, one line each."""
    from gemcut.report import Check

    module, worst = found.worst
    lines = [
        (f"linears in {found.scheme}", f"{found.modules}, {found.bits_per_weight:.3f} bits per weight"),
        ("they read back", f"relative error {found.relative_error:.4f} on average, {worst:.4f} at most ({module})"),
        ("scales", "finite, plausible, shared where servers fuse"),
        ("ignore list", "says what the tensors say, under the names and rules of vLLM"),
        ("everything else", f"{found.untouched} tensors are the base's, byte for byte"),
        ("size", f"{100 * found.size_ratio:.1f} % of the base"),
    ]
    lines += [("FP8 cache", "scales of every layer are plausible")] if found.cache else []
    return [*(Check(name, True, detail) for name, detail in lines), *stages.checks(found.verified)]


def local_model(ref: str) -> str:
    """A model as a server on this machine finds it."""
    path = shipped.model_path(ref)
    return ref if path is None else str(path)


def public_model(ref: str) -> str:
    """The same for others: without the folders of this machine."""
    path = shipped.model_path(ref)
    return path.name if path is not None else Path(ref).name if Path(ref).exists() else ref


def served_here(packed: Packed) -> Serving:
    """The command on this machine."""
    drafter = None if packed.drafter is None else local_model(packed.drafter)
    return serving(packed.open(), ServeWords(model=str(packed.folder), name=packed.name, drafter=drafter))


# ---------------------------------------------------------------- for the report


def described(packed: Packed, against: str) -> Nvfp4:
    """What the report says of the folder, from the folder, its record and the headers of what was quantised."""
    from gemcut.report import KldEntry, Nvfp4

    folder, parent = packed.open(), packed.parent
    record = store.read_json(packed.folder / RECORD, "record of an NVFP4 checkpoint")
    drafter = None if packed.drafter is None else public_model(packed.drafter)
    served = serving(folder, ServeWords(drafter=drafter))
    left = record.get("left")
    reasons = Counter(str(why) for why in left.values()) if isinstance(left, dict) else Counter()
    borrowed = record.get("borrowed")
    return Nvfp4(
        name=folder.name,
        source=parent.name,
        source_bytes=parent.size_bytes,
        size_bytes=folder.size_bytes,
        scheme=served.scheme,
        layout=served.layout,
        asked={word: str(record[word]) for word in ASKED if record.get(word)},
        parts=_parts(folder, parent, record),
        serve=served.line,
        needs=served.needs,
        left=dict(reasons),
        borrowed=tuple(map(str, borrowed)) if isinstance(borrowed, list) else (),
        corpus=str(record.get("corpus", "")),
        observed=None if packed.statistics is None else records.load_statistics_index(packed.statistics).meta,
        kld=None if packed.measured is None else KldEntry(folder.name, packed.measured),
        against=against,
    )


def _parts(folder: Checkpoint, parent: Checkpoint, record: Mapping[str, Json]) -> tuple[Nvfp4Part, ...]:
    from gemcut.report import Nvfp4Part

    modules = record.get("modules")
    assert isinstance(modules, dict)
    shapes = {name: ref.shape for name, ref in parent.tensors.items()}
    groups = [
        group
        for group in parent.family.linears().groups(parent.text_config, shapes)
        if group.matrices[0].module in modules
    ]
    told = {name: ref.size_bytes for name, ref in folder.tensors.items()}
    out = []
    for part in dict.fromkeys(group.part for group in groups):
        matrices = [matrix for group in groups if group.part == part for matrix in group.matrices]
        errors = {matrix.module: _error(modules[matrix.module]) for matrix in matrices}
        worst = max(errors, key=lambda name: errors[name])
        names = {matrix.module for matrix in matrices}
        out.append(
            Nvfp4Part(
                part,
                len(matrices),
                sum(matrix.rows * matrix.columns for matrix in matrices),
                sum(parent.ref(name).size_bytes for name in {matrix.tensor for matrix in matrices}),
                sum(size for name, size in told.items() if name.rpartition(".")[0] in names),
                sum(errors.values()) / len(errors),
                (worst, errors[worst]),
            )
        )
    return tuple(out)


def _error(numbers: Json) -> float:
    found = numbers.get("relative_error") if isinstance(numbers, dict) else None
    return float(found) if isinstance(found, (int, float)) else 0.0


def model_facts(packed: Packed, parent: ModelFacts) -> ModelFacts:
    """The parent's facts with the folder's bytes: parameters do not change when they are packed."""
    from dataclasses import replace

    folder = packed.open()
    component = folder.family.component
    sizes: dict[str, int] = dict.fromkeys(parent.components, 0)
    for name, ref in folder.tensors.items():
        part = component(name)
        sizes[part] = sizes.get(part, 0) + ref.size_bytes
    return replace(
        parent,
        name=folder.name,
        dtype=f"{serving(folder).scheme}, else {parent.dtype}",
        size_bytes=folder.size_bytes,
        components=sizes,
        fingerprint=folder.fingerprint,
        hub_id=None,
    )


# ---------------------------------------------------------------- before it begins


def packed_bytes(model: Checkpoint, words: Nvfp4Words) -> tuple[int, int]:
    """Bytes of the weights after the export, but for headers and cache scales; and of the largest matrix, as stored."""
    choice = choose(model, words.targets, words.ignore, narrow=words.narrow)
    gone = sum(model.ref(name).size_bytes for name in choice.tensors)
    matrices = [matrix for group in choice.chosen for matrix in group.matrices]
    made = sum(
        DTYPE_BYTES[ref.dtype] * ref.elements
        for matrix in matrices
        for ref in tensors_of(matrix, words.layout, words.scheme)
    )
    return model.size_bytes - gone + made, max(matrix.rows * matrix.columns for matrix in matrices) * 2
