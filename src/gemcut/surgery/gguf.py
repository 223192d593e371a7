"""A plan cuts a GGUF file as it is: kept blocks are copied, nothing is quantised anew.

Rows are quantised apart from one another, and an expert is a run of rows: so the tensors are, byte for byte, those of
the cut checkpoint exported with the same types and the importances of the kept experts. The metadata differs: names
and provenance stay this file's.

Heads that leave take rows of the queries, keys and values, and columns of the output. Columns are cut where a head is
whole blocks wide, and where no block depends on its neighbours: those of `ROW_WIDE` types do, with importances, and
those that were picked for their whole row (see `export.imatrix.blocks`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gemcut import __version__
from gemcut.checkpoint.gather import new_buffer, pieces
from gemcut.checkpoint.read import Progress
from gemcut.errors import CheckpointError, UsageError
from gemcut.families import gguf_cuts
from gemcut.families.gguf import Value, size_label
from gemcut.families.heads import mode_of
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import GgufFile, Layout, gguf_writer, lay_out, open_gguf
from gemcut.gguf_file.compare import as_bytes, diff_gguf, take_of_blocks
from gemcut.gguf_file.identity import gguf_fingerprint
from gemcut.records import plan_text, save_manifest
from gemcut.store import disk_errors, fingerprint, need_disk, refuse_existing
from gemcut.surgery.edits import check_units, positions, without_heads
from gemcut.types import Manifest, Plan, Take, TensorRef

MANIFEST = ".manifest.json"  # NAME.gguf.manifest.json
PARENT, CUT = "gemcut.parent.fingerprint", "gemcut.cut."
ROW_WIDE = frozenset({GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1})
"""With importances, the scale of each block is weighed by the mean square of its whole row (ggml-quants.c, sigma2)."""
_ROUNDINGS = "gemcut.imatrix.roundings"
_SIZE_LABEL = "general.size_label"
_RECORDS = (MANIFEST, ".json")  # that lie beside a file and speak of its bytes
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class GgufCut:
    """A cut that was checked and not yet written.

    edits: rows and columns, by the tensors' names in the file.   layout: of the file to write.
    """

    file: GgufFile
    edits: Mapping[str, Take]
    layout: Layout


def plan_gguf_cut(file: GgufFile, plan: Plan, name: str, *, any_parent: bool = False) -> GgufCut:
    """What the plan makes of the file.

    Args:
        name: of the file to write.
        any_parent: believe that the file was made from the plan's model where it does not say from which it was.
    Raises:
        UsageError: see `check_plan`; an architecture that nobody knows, heads that are masked, columns that cannot be
            cut without quantising anew.
        CheckpointError: the file was made from another model than the plan, or does not say from which.
    """
    _check_parent(file, plan, any_parent)
    shapes = {ref.name: ref.shape for ref in file.tensors.values()}
    cuts = gguf_cuts(file.metadata, shapes)
    where = file.path.name
    edits: dict[str, Take] = {}
    if plan.kind == "experts":
        check_units(plan, {layer: site.units for layer, site in cuts.experts.items()}, cuts.top_k, where=where)
        for layer, one in plan.layers.items():
            for part in cuts.experts[layer].slices:
                edits[part.name] = Take(part.axis, positions(one.keep, part.block))
    else:
        if mode_of(plan) != "structural":
            raise UsageError(
                "heads of a GGUF file can leave it, not be masked in it",
                where=where,
                got="mode mask",
                wanted="a plan of mode structural",
                hint="or cut the safetensors model, and export that: gemcut gguf MODEL --plan",
            )
        attention = cuts.attention()
        check_units(plan, {layer: one.heads for layer, one in attention.items()}, 0, where=where)
        for layer, one in plan.layers.items():
            edits |= without_heads(attention[layer], shapes, layer, one)
            if one.drop:
                _check_columns(file, attention[layer].o, edits[attention[layer].o])
    new = {ref: _shape(shape, edits.get(ref)) for ref, shape in shapes.items()}
    metadata = {**file.metadata, **cuts.after(new), **_provenance(file, plan)}
    if file.value(_SIZE_LABEL) == size_label(shapes):
        metadata[_SIZE_LABEL] = Value("str", size_label(new))
    entries = [(ref.name, ref.kind, new[ref.name]) for ref in file.tensors.values()]
    return GgufCut(file, edits, lay_out(metadata, entries, name=name))


def _shape(shape: tuple[int, ...], take: Take | None) -> tuple[int, ...]:
    if take is None:
        return shape
    return (*shape[: take.axis], len(take.index), *shape[take.axis + 1 :])


def _check_parent(file: GgufFile, plan: Plan, any_parent: bool) -> None:
    """The file says which checkpoint it holds, unless another program wrote it or it was cut: a cut folder has a
    fingerprint that no GGUF file can know."""
    cut = sorted(key for key in file.metadata if key.startswith(CUT))
    said = file.value(f"{CUT}fingerprint" if cut else PARENT)
    if said == plan.model_fingerprint and cut in ([], [f"{CUT}fingerprint"]):
        return
    if isinstance(said, str) and not cut:
        raise CheckpointError(
            "the plan was made for another checkpoint than this file",
            where=file.path.name,
            got=f"fingerprint {said[:12]}",
            wanted=plan.model_fingerprint[:12],
            hint="plan again from statistics of the checkpoint that the file was exported from",
        )
    if not any_parent:
        raise CheckpointError(
            "this file does not say which checkpoint it holds, so the plan may be another model's",
            where=file.path.name,
            got="a file that was cut before" if cut else f"no {PARENT}",
            wanted=f"fingerprint {plan.model_fingerprint[:12]}",
            hint="pass --any-parent where you know that it was made from the plan's model",
        )


def _check_columns(file: GgufFile, name: str, take: Take) -> None:
    ref = file.ref(name)
    take_of_blocks(ref, take)
    row_wide = ref.kind in ROW_WIDE and any(key.startswith("quantize.imatrix") for key in file.metadata)
    if row_wide or _ROUNDINGS in file.metadata:
        raise UsageError(
            "these columns cannot be cut without quantising anew",
            where=name,
            got=f"{ref.kind.name} with importances, where each block depends on its whole row",
            hint="cut the safetensors model with this plan, and export that: gemcut gguf MODEL --plan",
        )


def _provenance(file: GgufFile, plan: Plan) -> dict[str, Value]:
    return {
        f"{CUT}version": Value("str", __version__),
        f"{CUT}plan": Value("str", fingerprint({"plan": plan_text(plan)})),
        f"{CUT}source": Value("str", gguf_fingerprint(file)),
    }


def write_gguf_cut(cut: GgufCut, out: Path, *, force: bool = False, progress: Progress | None = None) -> Manifest:
    """Write the file, read it back, and keep what is found beside it (`OUT.manifest.json`), which comes last.

    Raises:
        UsageError: `out` exists without `force`, or is a part of the file that is cut.
        MissingError: the disk is full or too small.
        CheckpointError: the source ended early, or what was written is not what the plan asks for.
    """
    refuse_existing(out, force=force)
    if out.is_dir():
        raise UsageError("the output is a folder, not a file", where=str(out), hint="-o NAME.gguf")
    if out.exists() and any(os.path.samefile(out, cut.file.path.with_name(part)) for part in cut.file.parts):
        raise UsageError("the output is the file that is cut", where=out.name, hint="choose another -o")
    need_disk(out, cut.layout.size_bytes + _SPARE_BYTES)
    with disk_errors(out):
        for record in _RECORDS:
            out.with_name(out.name + record).unlink(missing_ok=True)
    _copy(cut, out, progress)
    try:
        manifest = verify_gguf_cut(cut, open_gguf(out), progress=progress)
    except CheckpointError:
        out.unlink()  # it shall not be mistaken for a model
        raise
    save_manifest(manifest, out.with_name(out.name + MANIFEST))
    return manifest


def _copy(cut: GgufCut, out: Path, progress: Progress | None) -> None:
    buffer, total, done = new_buffer(), cut.layout.size_bytes - cut.layout.data_start, 0
    with ExitStack() as stack, gguf_writer(out, cut.layout) as writer:
        opened: dict[Path, int] = {}
        for name, ref in cut.layout.tensors.items():
            path, view, take = _source(cut, name)
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, opened[path])
            at = 0
            for piece in pieces(opened[path], view, take, buffer):
                writer.write(name, at, piece)
                at += len(piece)
            done += ref.size_bytes
            if progress is not None:
                progress(done, total, "cutting")


def _source(cut: GgufCut, name: str) -> tuple[Path, TensorRef, Take | None]:
    stored, take = as_bytes(cut.file, name), cut.edits.get(name)
    return stored.path, stored.ref, None if take is None else take_of_blocks(cut.file.ref(name), take)


def verify_gguf_cut(cut: GgufCut, out: GgufFile, *, progress: Progress | None = None) -> Manifest:
    """Hold the bytes of a cut file against the file that it was cut from, and against the plan.

    Raises:
        CheckpointError: a tensor is not what the plan makes of it, or the metadata says something else.
    """
    manifest = diff_gguf(cut.file, out, expected=cut.edits, progress=progress)
    wrong = []
    for fact in manifest.tensors:
        take = cut.edits.get(fact.name)
        if take is not None and len(take.index) < cut.file.ref(fact.name).shape[take.axis]:
            as_planned = (fact.found, fact.axis, fact.index) == ("take", take.axis, take.index)
        else:
            as_planned = fact.found == "same"
        if not as_planned:
            wrong.append(fact)
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are not as planned",
            where=wrong[0].name + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            got=wrong[0].found,
            wanted="what the plan takes, all else the same",
        )
    meant = {key: value for key, value in cut.layout.metadata.items() if not key.startswith(CUT)}
    said = {key: value for key, value in out.metadata.items() if not key.startswith(CUT)}
    differ = next((key for key in {**meant, **said} if repr(meant.get(key)) != repr(said.get(key))), None)
    if differ is not None:
        got, wanted = (repr(side[differ].value)[:80] if differ in side else "no such key" for side in (said, meant))
        raise CheckpointError("the metadata is not what the plan makes of it", where=differ, got=got, wanted=wanted)
    return manifest
