"""A cut of a GGUF file is, byte for byte, the export of the cut checkpoint; and what is refused instead of guessed."""

from __future__ import annotations

import contextlib
import itertools
import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.export.imatrix import Entry, Imatrix, wants_importance, write_imatrix
from gemcut.export.imatrix.entries import Inputs
from gemcut.export.layout import layout_of
from gemcut.exporting import GgufWords, after_plan, plan_export, write_export
from gemcut.families.gguf import GgufLayout, Value
from gemcut.ggml.model import Model
from gemcut.ggml.quantise import quantise, requires_imatrix
from gemcut.ggml.types import BLOCKS, GgmlType, tensor_bytes
from gemcut.gguf_cutting import verify
from gemcut.gguf_file import GgufFile, gguf_writer, lay_out, open_gguf
from gemcut.records import load_manifest, save_plan
from gemcut.surgery import plan_gguf_cut, write_gguf_cut
from gemcut.surgery.gguf import ROW_WIDE
from gemcut.types import LayerPlan, Plan
from tiny import make_tiny

TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "IQ3_M", "IQ2_XXS")
PLAIN = ("BF16", "Q5_1", "Q3_K_S")
HEADS = {0: (0, 1), 1: (0, 2, 3)}  # other numbers in every layer, and a KV head less in the first
UNITS = 10  # eight, or fewer than four, and stock mixes would choose other types for the cut
KEEP = {0: (0, 3, 4, 6, 9), 1: (1, 2, 5, 7, 8)}
QUANTISED = [kind for kind in GgmlType if BLOCKS[kind].values > 1]
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


def test_blocks_picked_of_several_roundings_are_those_of_each_expert(tmp_path: Path, moe: Checkpoint) -> None:
    plain, rng = importances(layout_of(moe)), np.random.default_rng(2)
    inputs = {}
    for name, entry in plain.entries.items():
        mean = rng.standard_normal(entry.sums.shape, np.float32)
        inputs[name] = Inputs(mean, np.abs(mean) + 1)
    write_imatrix(tmp_path / "picked.gguf", replace(plain, roundings=3, inputs=inputs))
    write_imatrix(tmp_path / "plain.gguf", plain)
    plan = expert_plan(moe)
    save_plan(plan, tmp_path / "plan.json")
    for imatrix, out in (("picked.gguf", "a"), ("plain.gguf", "b")):
        export(moe, tmp_path / out, ("Q4_K_M",), tmp_path / imatrix)
    export(after_plan(moe, tmp_path / "plan.json"), tmp_path / "a", ("Q4_K_M",), tmp_path / "picked.gguf")
    picked, once = (open_gguf(tmp_path / out / "moe-Q4_K_M.gguf") for out in "ab")
    assert payloads(picked) != payloads(once)
    write_gguf_cut(plan_gguf_cut(picked, plan, "cut.gguf"), tmp_path / "cut.gguf")
    assert payloads(open_gguf(tmp_path / "cut.gguf")) == payloads(open_gguf(tmp_path / "a" / "moe-cut-Q4_K_M.gguf"))


def said(path: Path) -> np.ndarray:
    with Model(path, threads=1, context=256, trial=False) as model:
        return model.logits(list(range(2, 60)))


@pytest.mark.parametrize("name", ["Q8_0", "IQ3_M"])
def test_the_library_says_the_same_with_both(
    tmp_path: Path, moe: Checkpoint, exported: Path, cut_first: Path, name: str
) -> None:
    cut = plan_gguf_cut(open_gguf(exported / f"moe-{name}.gguf"), expert_plan(moe), "cut.gguf")
    write_gguf_cut(cut, tmp_path / "cut.gguf")
    assert np.array_equal(said(tmp_path / "cut.gguf"), said(cut_first / f"moe-cut-{name}.gguf"))
    assert not np.array_equal(said(tmp_path / "cut.gguf"), said(exported / f"moe-{name}.gguf"))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, dense: Checkpoint) -> Path:
    """The dense model before and after a structural cut of heads."""
    folder = tmp_path_factory.mktemp("heads")
    write_imatrix(folder / "imatrix.gguf", importances(layout_of(dense)))
    save_plan(head_plan(dense, HEADS, 4), folder / "plan.json")
    for model in (dense, after_plan(dense, folder / "plan.json")):
        export(model, folder, TYPES, folder / "imatrix.gguf")
        export(model, folder, PLAIN, None)
    return folder


@pytest.mark.parametrize("name", [*TYPES, *PLAIN])
def test_heads_leave_blocks_as_they_are(tmp_path: Path, dense: Checkpoint, heads: Path, name: str) -> None:
    before, plan = open_gguf(heads / f"dense-{name}.gguf"), head_plan(dense, HEADS, 4)
    if name == "Q4_0":  # with importances
        with pytest.raises(UsageError, match="cannot be cut without quantising anew"):
            plan_gguf_cut(before, plan, "cut.gguf")
        return
    manifest = write_gguf_cut(plan_gguf_cut(before, plan, "cut.gguf"), tmp_path / "cut.gguf")
    after, wanted = open_gguf(tmp_path / "cut.gguf"), open_gguf(heads / f"dense-cut-{name}.gguf")
    assert payloads(after) == payloads(wanted)
    for key in ("head_count", "head_count_kv"):
        assert after.metadata[f"gemma4.attention.{key}"] == wanted.metadata[f"gemma4.attention.{key}"]
    assert after.value("gemma4.attention.head_count") == (2, 3)
    columns = next(fact for fact in manifest.tensors if fact.name == "blk.1.attn_output.weight")
    assert (columns.axis, columns.index) == (1, (*range(512), *range(1024, 2048)))
    assert np.array_equal(said(tmp_path / "cut.gguf"), said(heads / f"dense-cut-{name}.gguf"))


@pytest.mark.slow  # the tables of IQ1 and IQ2 types take their time
def test_types_whose_blocks_depend_on_their_row() -> None:
    """Columns of random rows, cut before and after: the same bytes, but for what is refused."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((8, 2048), np.float32) * np.exp(rng.standard_normal(8, np.float32)).repeat(256)
    importance = rng.random(2048, np.float32) ** 3 + np.float32(0.01)
    keep = np.r_[0:512, 1024:1536]
    wide, checked = set(), 0
    for kind, weights in itertools.product(QUANTISED, (None, importance)):
        if weights is None and requires_imatrix(kind):
            continue
        block = BLOCKS[kind]
        whole, half = (np.empty(tensor_bytes(kind, (8, columns)), np.uint8) for columns in (2048, 1024))
        quantise(values, kind, weights, whole)
        quantise(np.ascontiguousarray(values[:, keep]), kind, None if weights is None else weights[keep], half)
        kept = whole.reshape(8, 2048 // block.values, -1)[:, np.unique(keep // block.values)]
        if not np.array_equal(kept.reshape(-1), half):
            assert weights is not None, kind
            wide.add(kind)
        checked += 1
    assert wide == ROW_WIDE
    assert checked > 40


def test_blocks_that_were_picked_for_their_row_are_refused(tmp_path: Path, dense: Checkpoint, heads: Path) -> None:
    file = open_gguf(heads / "dense-Q8_0.gguf")
    picked = rewritten(file, tmp_path / "p.gguf", {**file.metadata, "gemcut.imatrix.roundings": Value("u32", 8)})
    with pytest.raises(UsageError, match="depends on its whole row"):
        plan_gguf_cut(picked, head_plan(dense, HEADS, 4), "x.gguf")


def test_why_old_types_with_importances_are_refused(heads: Path) -> None:
    """The kept blocks of the output do differ: the refusal is not out of caution."""
    before = open_gguf(heads / "dense-Q4_0.gguf").read("blk.0.attn_output.weight").reshape(256, 1024 // 32, 18)
    after = open_gguf(heads / "dense-cut-Q4_0.gguf").read("blk.0.attn_output.weight").reshape(256, 512 // 32, 18)
    assert not np.array_equal(before[:, : 512 // 32], after)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_experts_may_stay(tmp_path: Path, moe: Checkpoint, exported: Path, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, UNITS))
    keep = {layer: tuple(sorted(data.draw(st.permutations(range(UNITS)))[:count])) for layer in range(len(LAYERS))}
    before, plan = open_gguf(exported / "moe-IQ2_XXS.gguf"), expert_plan(moe, keep)
    out = tmp_path / "cut.gguf"
    write_gguf_cut(plan_gguf_cut(before, plan, out.name), out, force=True)
    after = open_gguf(out)
    for layer, name in itertools.product(keep, ("gate_up_exps.weight", "down_exps.weight", "gate_inp.weight")):
        old, new = (file.read(f"blk.{layer}.ffn_{name}") for file in (before, after))
        assert np.array_equal(new.reshape(count, -1), old.reshape(UNITS, -1)[list(keep[layer])])
    save_plan(plan, tmp_path / "plan.json", force=True)
    found = verify(out, before.path, tmp_path / "plan.json")
    assert found.plan_checked
    assert found.record_checked


def test_a_split_file_is_joined(tmp_path: Path, moe: Checkpoint) -> None:
    export(moe, tmp_path, ("Q8_0",), None, max_shard_bytes=400_000)
    export(moe, tmp_path / "whole", ("Q8_0",), None)
    whole = open_gguf(tmp_path / "whole" / "moe-Q8_0.gguf")
    split = open_gguf(next(tmp_path.glob("*-00002-of-*.gguf")))
    assert len(split.parts) > 2
    for name, file in (("a.gguf", whole), ("b.gguf", split)):
        write_gguf_cut(plan_gguf_cut(file, expert_plan(moe), name), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_separate_gate_and_up_are_cut_alike(tmp_path: Path, moe: Checkpoint, exported: Path) -> None:
    """As other converters write them; llama.cpp reads both."""
    fused = open_gguf(exported / "moe-Q8_0.gguf")
    entries: list[tuple[str, GgmlType, tuple[int, ...]]] = []
    payload: dict[str, bytes] = {}
    for name, ref in fused.tensors.items():
        if "gate_up" not in name:
            entries.append((name, ref.kind, ref.shape))
            payload[name] = fused.read(name).tobytes()
            continue
        halves = fused.read(name).reshape(UNITS, 2, -1)
        for half, part in enumerate(("gate", "up")):
            other = name.replace("gate_up", part)
            entries.append((other, ref.kind, (UNITS, ref.shape[1] // 2, ref.shape[2])))
            payload[other] = halves[:, half].tobytes()
    with gguf_writer(tmp_path / "apart.gguf", lay_out(fused.metadata, entries, name="apart.gguf")) as writer:
        for name, raw in payload.items():
            writer.write(name, 0, memoryview(raw))
    for file, out in ((open_gguf(tmp_path / "apart.gguf"), "a.gguf"), (fused, "b.gguf")):
        write_gguf_cut(plan_gguf_cut(file, expert_plan(moe), out), tmp_path / out)
    assert open_gguf(tmp_path / "a.gguf").ref("blk.0.ffn_up_exps.weight").shape == (5, 256, 256)
    assert np.allclose(said(tmp_path / "a.gguf"), said(tmp_path / "b.gguf"), atol=1e-4)


# ---------------------------------------------------------------- what is refused


def rewritten(file: GgufFile, path: Path, metadata: dict[str, Value]) -> GgufFile:
    layout = lay_out(metadata, [(ref.name, ref.kind, ref.shape) for ref in file.tensors.values()], name=path.name)
    with gguf_writer(path, layout) as writer:
        for name in layout.tensors:
            writer.write(name, 0, file.read(name).data)
    return open_gguf(path)


def test_the_plan_must_be_of_the_files_parent(tmp_path: Path, moe: Checkpoint, exported: Path, cut_first: Path) -> None:
    file, plan = open_gguf(exported / "moe-Q8_0.gguf"), expert_plan(moe)
    for any_parent in (False, True):  # what the file says is never overruled
        with pytest.raises(CheckpointError, match="another checkpoint than this file"):
            plan_gguf_cut(file, replace(plan, model_fingerprint="0" * 64), "x.gguf", any_parent=any_parent)
    foreign = rewritten(
        file, tmp_path / "f.gguf", {k: v for k, v in file.metadata.items() if not k.startswith("gemcut.")}
    )
    with pytest.raises(CheckpointError, match="does not say which checkpoint"):
        plan_gguf_cut(foreign, plan, "x.gguf")
    write_gguf_cut(plan_gguf_cut(foreign, plan, "x.gguf", any_parent=True), tmp_path / "x.gguf")
    write_gguf_cut(plan_gguf_cut(file, plan, "y.gguf"), tmp_path / "y.gguf")
    x, y = open_gguf(tmp_path / "x.gguf"), open_gguf(tmp_path / "y.gguf")
    assert payloads(x) == payloads(y)
    on_the_way = open_gguf(cut_first / "moe-cut-Q8_0.gguf")
    for cut, (any_parent, error) in itertools.product(
        (y, on_the_way), ((False, "does not say"), (True, "another number of experts"))
    ):
        with pytest.raises(CheckpointError, match=error):
            plan_gguf_cut(cut, plan, "x.gguf", any_parent=any_parent)


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ({0: (0, 1, 12), 1: (0, 1, 2)}, "does not exist"),
        ({0: (0,), 1: (0,)}, "fewer experts than the router selects"),
        ({0: (0, 1), 1: (0, 1, 2)}, "different numbers of experts"),
        ({0: (0, 1)}, "disagree about the layers"),
    ],
)
def test_plans_that_mean_nothing(moe: Checkpoint, exported: Path, keep: dict[int, tuple[int, ...]], error: str) -> None:
    with pytest.raises((UsageError, CheckpointError), match=error):
        plan_gguf_cut(open_gguf(exported / "moe-Q8_0.gguf"), expert_plan(moe, keep), "x.gguf")


def test_files_that_cannot_be_cut(tmp_path: Path, moe: Checkpoint, dense: Checkpoint, exported: Path) -> None:
    export(dense, tmp_path, ("Q8_0",), None)
    file = open_gguf(tmp_path / "dense-Q8_0.gguf")
    with pytest.raises(UsageError, match="no experts to cut"):
        plan_gguf_cut(file, replace(expert_plan(moe), model_fingerprint=dense.fingerprint), "x.gguf")
    with pytest.raises(UsageError, match="not be masked"):
        plan_gguf_cut(file, head_plan(dense, HEADS, 4, "mask"), "x.gguf")
    with pytest.raises(UsageError, match="another KV head"):
        plan_gguf_cut(file, head_plan(dense, {0: (0, 1, 2)}, 4), "x.gguf")
    narrow = open_gguf(exported / "moe-Q4_K_M.gguf")  # heads of 64 columns in blocks of 256
    with pytest.raises(UsageError, match="quantising anew"):
        plan_gguf_cut(narrow, head_plan(moe, {0: (0, 3)}, 4), "x.gguf")
    whole = open_gguf(exported / "moe-Q8_0.gguf")
    changes: dict[str, Value] = {
        "general.architecture": Value("str", "llama"),
        "gemma4.expert_count": Value("u32", 9),
    }
    for (key, value), error in zip(changes.items(), ("no family knows", "tensor disagree"), strict=True):
        strange = rewritten(whole, tmp_path / "strange.gguf", {**whole.metadata, key: value})
        with pytest.raises((UsageError, CheckpointError), match=error):
            plan_gguf_cut(strange, expert_plan(moe), "x.gguf")


def test_outputs_that_cannot_be(tmp_path: Path, moe: Checkpoint, exported: Path) -> None:
    source = tmp_path / "moe.gguf"
    source.write_bytes((exported / "moe-Q8_0.gguf").read_bytes())
    cut = plan_gguf_cut(open_gguf(source), expert_plan(moe), "cut.gguf")
    out = tmp_path / "cut.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(MissingError, match="disk is full"):
            write_gguf_cut(cut, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["moe.gguf"]
    for force, error in ((False, "exists already"), (True, "the file that is cut")):
        with pytest.raises(UsageError, match=error):
            write_gguf_cut(cut, source, force=force)
    with open(source, "r+b") as f:  # after its header was read
        f.truncate(source.stat().st_size - 100_000)
    with pytest.raises(CheckpointError, match="ended before"):
        write_gguf_cut(cut, out)
    assert [path.name for path in tmp_path.iterdir()] == ["moe.gguf"]
    with pytest.raises(CheckpointError):
        open_gguf(source)


def test_a_changed_byte_is_found(tmp_path: Path, moe: Checkpoint, exported: Path) -> None:
    source, out = exported / "moe-Q4_K_M.gguf", tmp_path / "cut.gguf"
    plan = expert_plan(moe)
    write_gguf_cut(plan_gguf_cut(open_gguf(source), plan, out.name), out)
    save_plan(plan, tmp_path / "plan.json")
    assert verify(out, source, None).record_checked
    ref = open_gguf(out).ref("blk.1.ffn_down_exps.weight")
    with open(out, "r+b") as f:
        f.seek(ref.start + 1000)
        byte = f.read(1)[0]
        f.seek(ref.start + 1000)
        f.write(bytes([byte ^ 1]))
    for plan_file in (tmp_path / "plan.json", None):
        with pytest.raises(CheckpointError) as error:
            verify(out, source, plan_file)
        assert "blk.1.ffn_down_exps.weight" in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_headers_that_lie_end_in_a_refusal(
    moe: Checkpoint, dense: Checkpoint, exported: Path, heads: Path, data: st.DataObject
) -> None:
    """Keys and tensors that are gone, or say something else than the rest."""
    experts = data.draw(st.booleans())
    file = open_gguf(exported / "moe-Q8_0.gguf" if experts else heads / "dense-Q8_0.gguf")
    plan = expert_plan(moe) if experts else head_plan(dense, HEADS, 4)
    metadata, tensors = dict(file.metadata), dict(file.tensors)
    own = [key for key in metadata if not key.startswith("tokenizer.")]
    scalar = st.sampled_from([0, 1, 3, 2**31 - 1])
    wrong = st.one_of(
        st.builds(lambda n: Value("u32", n), scalar),
        st.builds(lambda n: Value("i32", (n,) * 2), scalar),
        st.sampled_from([Value("str", "x"), Value("bool", (True,)), Value("f32", float("nan")), None]),
    )
    for key in data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=3, unique=True)):
        value = data.draw(wrong)
        metadata = {k: v for k, v in metadata.items() if k != key} | ({} if value is None else {key: value})
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        ref = tensors.pop(name)
        if data.draw(st.booleans()):
            tensors[name] = replace(ref, shape=ref.shape[1:])
    with contextlib.suppress(UsageError, CheckpointError):
        plan_gguf_cut(replace(file, metadata=metadata, tensors=tensors), plan, "x.gguf", any_parent=True)
