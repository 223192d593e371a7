"""A cut of a GGUF file is, byte for byte, the export of the cut checkpoint; and what is refused instead of guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.export.imatrix import Entry, Imatrix, wants_importance, write_imatrix
from gemcut.export.layout import layout_of
from gemcut.exporting import GgufWords, after_plan, plan_export, write_export
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import GgufFile, open_gguf
from gemcut.records import load_manifest, save_plan
from gemcut.surgery import plan_gguf_cut, write_gguf_cut
from gemcut.types import LayerPlan, Plan
from tiny import make_tiny

TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "IQ3_M", "IQ2_XXS", "IQ1_M")
PLAIN = ("BF16", "Q5_1", "Q3_K_S")
UNITS = 10  # eight, or fewer than four, and stock mixes would choose other types for the cut
KEEP = {0: (0, 3, 4, 6, 9), 1: (1, 2, 5, 7, 8)}
LAYERS = ["sliding_attention", "full_attention"]


def layer_plan(keep: tuple[int, ...], units: int) -> LayerPlan:
    return LayerPlan(keep, {u: "not wanted" for u in range(units) if u not in keep})


def expert_plan(base: Checkpoint, keep: Mapping[int, tuple[int, ...]] = KEEP) -> Plan:
    return Plan("experts", base.fingerprint, UNITS, {layer: layer_plan(kept, UNITS) for layer, kept in keep.items()})


def head_plan(base: Checkpoint, keep: Mapping[int, tuple[int, ...]], units: int, mode: str = "structural") -> Plan:
    layers = {layer: layer_plan(kept, units) for layer, kept in keep.items()}
    return Plan("heads", base.fingerprint, units, layers, params={"mode": mode})


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Every row is whole blocks of 256."""
    folder = make_tiny(
        tmp_path_factory.mktemp("moe"), "moe", hidden_size=256, intermediate_size=256, moe_intermediate_size=256,
        num_hidden_layers=2, layer_types=LAYERS, head_dim=64, global_head_dim=64, num_experts=UNITS,
    )  # fmt: skip
    return open_checkpoint(folder, "moe")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Heads as wide as the large models': one block of every type, and two."""
    folder = make_tiny(
        tmp_path_factory.mktemp("dense"), "dense", hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        layer_types=LAYERS, head_dim=256, global_head_dim=512,
    )  # fmt: skip
    return open_checkpoint(folder, "dense")


def importances(layout: GgufLayout) -> Imatrix:
    rng = np.random.default_rng(5)
    entries = {}
    for tensor in layout.tensors:
        if wants_importance(tensor):
            units = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums = rng.random((units, tensor.shape[-1]), np.float32) ** 4 * 100 + 0.01
            entries[tensor.name] = Entry(sums, rng.integers(1, 50, units))
    return Imatrix(entries, datasets=("text",), chunks=1, chunk_size=64)


def export(checkpoint: Checkpoint, out: Path, types: tuple[str, ...], imatrix: Path | None, **more: object) -> Path:
    exports = plan_export(checkpoint, GgufWords(types, imatrix, **more))  # type: ignore[arg-type]
    write_export(exports, out, threads=1)
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_imatrix(folder / "imatrix.gguf", importances(layout_of(moe)))
    export(moe, folder, TYPES, folder / "imatrix.gguf")
    return export(moe, folder, PLAIN, None)


@pytest.fixture(scope="module")
def cut_first(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint, exported: Path) -> Path:
    """The importances are those of the kept experts: the exporter takes them for a cut on the way."""
    folder = tmp_path_factory.mktemp("cut-first")
    save_plan(expert_plan(moe), folder / "plan.json")
    cut = after_plan(moe, folder / "plan.json")
    export(cut, folder, TYPES, exported / "imatrix.gguf")
    return export(cut, folder, PLAIN, None)


def payloads(file: GgufFile) -> dict[str, tuple[GgmlType, tuple[int, ...], bytes]]:
    return {ref.name: (ref.kind, ref.shape, file.read(ref.name).tobytes()) for ref in file.tensors.values()}


@pytest.mark.parametrize("name", [*TYPES, *PLAIN])
def test_cut_then_export_is_export_then_cut(
    tmp_path: Path, moe: Checkpoint, exported: Path, cut_first: Path, name: str
) -> None:
    plan = expert_plan(moe)
    before = open_gguf(exported / f"moe-{name}.gguf")
    manifest = write_gguf_cut(plan_gguf_cut(before, plan, "cut.gguf"), tmp_path / "cut.gguf")
    after, wanted = open_gguf(tmp_path / "cut.gguf"), open_gguf(cut_first / f"moe-cut-{name}.gguf")
    assert payloads(after) == payloads(wanted)
    theirs = {tensor.name: bytes(tensor.data) for tensor in GGUFReader(tmp_path / "cut.gguf").tensors}
    assert theirs == {ref: payload for ref, (_, _, payload) in payloads(wanted).items()}
    own = ("general.name", "general.basename", "general.finetune", "gemcut.", "quantize.imatrix")
    keys = [key for key in {**after.metadata, **wanted.metadata} if not key.startswith(own)]
    assert {key: after.metadata.get(key) for key in keys} == {key: wanted.metadata.get(key) for key in keys}
    assert after.value("gemma4.expert_count") == 5
    changed = {fact.name for fact in manifest.tensors if fact.found == "take"}
    tails = ("ffn_gate_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_inp.weight", "ffn_down_exps.scale")
    assert changed == {f"blk.{layer}.{tail}" for layer in KEEP for tail in tails}
    assert {f.found for f in manifest.tensors} == {"take", "same"}
    assert load_manifest(tmp_path / "cut.gguf.manifest.json") == manifest
