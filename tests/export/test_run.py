"""The exporter: one read for many files, the same bytes whatever the threads, and what a kill or an error leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import save_file

from export.plain_layout import METADATA, QUANTISER, Flat, demo, plain_layout, plain_types, planned
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.export.output import bytes_to_write
from gemcut.export.record import Journal
from gemcut.export.run import ExportReport, export_gguf
from gemcut.export.targets import Planned, Target, plan_target
from gemcut.families.gguf import GgufLayout, GgufTensor
from gemcut.ggml.library import load
from gemcut.ggml.quantise import quantise
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.gguf_file import open_gguf, read_gguf

LIBRARY = replace(load(), identity=QUANTISER)
KINDS = {"a": GgmlType.Q8_0, "b": GgmlType.Q4_K, "c": GgmlType.F16, "d": GgmlType.BF16}
LIMIT = 40


@pytest.fixture(scope="module")
def moe() -> Checkpoint:
    return demo("moe")


@pytest.fixture(scope="module")
def layout(moe: Checkpoint) -> GgufLayout:
    return plain_layout(moe, LIMIT)


def export(checkpoint: Checkpoint, layout: GgufLayout, plans: list[Planned], out: Path, **more: object) -> ExportReport:
    return export_gguf(checkpoint, layout, plans, out, library=LIBRARY, **more)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


def floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    raw = checkpoint.read(name).view("<u2").astype(np.uint32) << 16
    return raw.view(np.float32).reshape(checkpoint.ref(name).shape)


def test_every_payload_is_what_the_quantiser_makes_of_the_whole_tensor(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout
) -> None:
    importances = Flat(layout)
    export(moe, layout, planned(moe, layout, {"m": GgmlType.Q4_K}, importances), tmp_path)
    found = read_gguf(tmp_path / "m.gguf")
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(theirs) == {tensor.name for tensor in layout.tensors}
    checked = 0
    for tensor in layout.tensors:
        if tensor.source is None:
            assert found.read(tensor.name).tobytes() == tensor.values.tobytes()  # type: ignore[union-attr]
            continue
        values = floats(moe, tensor.source)
        kind = found.tensors[tensor.name].kind
        if kind is GgmlType.F32:
            assert found.read(tensor.name).tobytes() == values.tobytes()
            continue
        parts = list(values) if len(tensor.shape) == 3 else [values]
        wanted = bytearray()
        for unit, part in enumerate(parts):
            room = np.empty(tensor_bytes(kind, part.shape), np.uint8)
            quantise(np.ascontiguousarray(part), kind, importances.importance(tensor.name, unit), room)
            wanted += room.tobytes()
        assert found.read(tensor.name).tobytes() == bytes(wanted), tensor.name
        assert theirs[tensor.name].data.tobytes() == bytes(wanted)
        checked += 1
    assert checked > 10


def test_files_together_and_on_threads_equal_files_alone(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    plans = planned(moe, layout, KINDS)
    seen: list[tuple[int, int, str]] = []
    together = export(moe, layout, plans, tmp_path / "1", progress=lambda *step: seen.append(step))
    export(moe, layout, plans, tmp_path / "3", threads=3)
    for plan in plans:
        export(moe, layout, [plan], tmp_path / "apart" / plan.target.name)
    alone = {
        plan.target.name: (tmp_path / "apart" / plan.target.name / plan.target.name).read_bytes() for plan in plans
    }
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == alone
    assert (
        seen[-1][0]
        == seen[-1][1]
        == together.read_bytes
        == sum(moe.ref(tensor.source).size_bytes for tensor in layout.tensors if tensor.source)
    )
    assert [(f.name, f.size_bytes) for f in together.files] == [(n, len(raw)) for n, raw in sorted(alone.items())]
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_bf16_file_holds_the_bytes_on_disk(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    export(moe, layout, planned(moe, layout, {"m": GgmlType.BF16}), tmp_path)
    found = read_gguf(tmp_path / "m.gguf")
    for tensor in layout.tensors:
        if found.tensors[tensor.name].kind is GgmlType.BF16:
            assert tensor.source is not None
            assert found.read(tensor.name).tobytes() == moe.read(tensor.source).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_floats_and_exchanged_axes(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 4, 32)).astype(dtype)
    plain = rng.normal(size=(5, 64)).astype(dtype)
    checkpoint = made_checkpoint(tmp_path / "c", {"w": weight, "p": plain})
    layout = made_layout(
        GgufTensor("w.weight", (6, 32, 4), "w", permute=(0, 2, 1)),
        GgufTensor("flat.weight", (6, 128), "w", permute=(0, 2, 1)),
        GgufTensor("p.weight", (5, 64), "p"),
    )
    types = {"w.weight": GgmlType.F32, "flat.weight": GgmlType.F16, "p.weight": GgmlType.Q8_0}
    target = Target("m.gguf", types, METADATA)
    plans = [plan_target(target, layout, parent=checkpoint.fingerprint, quantiser=QUANTISER)]
    export(checkpoint, layout, plans, tmp_path / "o")
    found = read_gguf(tmp_path / "o" / "m.gguf")
    turned = weight.transpose(0, 2, 1)
    assert found.read("w.weight").tobytes() == turned.astype(np.float32).tobytes()
    assert found.read("flat.weight").tobytes() == turned.astype(np.float16).tobytes()
    room = np.empty(5 * 68, np.uint8)
    quantise(plain.astype(np.float32), GgmlType.Q8_0, None, room)
    assert found.read("p.weight").tobytes() == room.tobytes()


def made_checkpoint(folder: Path, tensors: dict[str, np.ndarray]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder, any_architecture=True)


def made_layout(*tensors: GgufTensor) -> GgufLayout:
    return GgufLayout("none", {}, tensors, 1, 0, 1, tied=True)


# ---------------------------------------------------------------- what is there already


def counts(report: ExportReport) -> dict[str, tuple[int, int, int, bool]]:
    return {f.name: (f.quantised, f.copied, f.resumed, f.found) for f in report.files}


def test_a_finished_file_is_left_alone_and_another_is_not_overwritten(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout
) -> None:
    plans = planned(moe, layout, {"m": GgmlType.Q8_0})
    export(moe, layout, plans, tmp_path)
    before = (tmp_path / "m.gguf").stat().st_mtime_ns
    assert counts(export(moe, layout, plans, tmp_path)) == {"m.gguf": (0, 0, 0, True)}
    assert (tmp_path / "m.gguf").stat().st_mtime_ns == before
    other = planned(moe, layout, {"m": GgmlType.Q4_K})
    with pytest.raises(UsageError, match="exists already"):
        export(moe, layout, other, tmp_path)
    export(moe, layout, other, tmp_path, force=True)
    assert read_gguf(tmp_path / "m.gguf").size_bytes == other[0].size_bytes


@pytest.mark.parametrize("split", [None, 1 << 20])
def test_a_damaged_file_is_not_taken_for_finished(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout, caplog: pytest.LogCaptureFixture, split: int | None
) -> None:
    plans = planned(moe, layout, {"m": GgmlType.Q8_0, "n": GgmlType.Q4_K}, max_shard_bytes=split)
    export(moe, layout, plans, tmp_path)
    wanted = contents(tmp_path)
    refs = open_gguf(tmp_path / plans[0].parts[0].name).tensors.values()
    ref = [one for one in refs if one.kind is not plans[1].target.types[one.name]][-1]  # n has no copy of it
    with open(tmp_path / ref.part, "r+b") as f:
        f.seek(ref.start + ref.size_bytes - 1)
        last = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes((last ^ 1,)))
    labels = set()
    tensors = len(layout.tensors)
    with caplog.at_level("WARNING", "gemcut"):
        report = export(moe, layout, plans, tmp_path, progress=lambda done, total, label: labels.add(label))
    assert counts(report) == {"m.gguf": (1, tensors - 1, 0, False), "n.gguf": (0, 0, 0, True)}
    assert labels == {"check", "quantise"}
    assert f"m.gguf is damaged in {ref.name}: it is written again" in caplog.text
    assert contents(tmp_path) == wanted
    assert export(moe, layout, plans, tmp_path).files[0].found


def test_unchanged_tensors_are_copied_from_an_earlier_export(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout
) -> None:
    export(moe, layout, planned(moe, layout, {"first": GgmlType.Q4_K}), tmp_path)
    plans = planned(moe, layout, {"second": GgmlType.Q4_K})
    types = dict(plans[0].target.types)
    matrix = next(name for name, kind in types.items() if kind is GgmlType.Q4_K)
    types[matrix] = GgmlType.Q6_K
    target = replace(plans[0].target, types=types)
    plan = plan_target(target, layout, parent=moe.fingerprint, quantiser=QUANTISER)
    changed = sum(types[n] is not plans[0].target.types[n] for n in types)
    report = export(moe, layout, [plan], tmp_path)
    assert counts(report) == {"second.gguf": (changed, len(types) - changed, 0, False)}
    export(moe, layout, [plan], tmp_path / "fresh")
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "fresh" / "second.gguf").read_bytes()


@pytest.mark.parametrize("what", ["importances", "weights", "payload", "record"])
def test_what_has_changed_is_not_copied(tmp_path: Path, layout: GgufLayout, moe: Checkpoint, what: str) -> None:
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(size=(64, 256)).astype(np.float32), "b": rng.normal(size=(8, 256)).astype(np.float32)}
    checkpoint = made_checkpoint(tmp_path / "c", values)
    layout = made_layout(GgufTensor("blk.0.a.weight", (64, 256), "a"), GgufTensor("blk.0.b.weight", (8, 256), "b"))
    out = tmp_path / "o"
    export(checkpoint, layout, planned(checkpoint, layout, {"m": GgmlType.Q4_K}, Flat(layout)), out)
    importances = Flat(layout)
    if what == "importances":
        importances = Flat(layout, lowest=0.2)
    if what == "weights":
        values = {name: value + 1 for name, value in values.items()}
        checkpoint = made_checkpoint(tmp_path / "c2", values)
    if what == "payload":
        found = read_gguf(out / "m.gguf")
        with open(out / "m.gguf", "r+b") as f:
            for ref in found.tensors.values():
                f.seek(ref.start)
                f.write(b"\x01")
    if what == "record":
        (out / "m.gguf.json").write_text(json.dumps({"format": "gemcut gguf", "schema": 1, "tensors": []}))
    plans = planned(checkpoint, layout, {"n": GgmlType.Q4_K}, importances)
    assert counts(export(checkpoint, layout, plans, out)) == {"n.gguf": (2, 0, 0, False)}
    export(checkpoint, layout, plans, tmp_path / "fresh")
    assert (out / "n.gguf").read_bytes() == (tmp_path / "fresh" / "n.gguf").read_bytes()


def test_the_record_names_no_place(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    export(moe, layout, planned(moe, layout, {"m": GgmlType.Q8_0}), tmp_path)
    text = (tmp_path / "m.gguf.json").read_text()
    assert str(tmp_path) not in text
    assert str(moe.path) not in text
    assert json.loads(text)["parent"] == moe.fingerprint


def test_parts_of_a_split_file_join_to_the_same_payload(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    export(moe, layout, planned(moe, layout, {"m": GgmlType.Q8_0}), tmp_path / "one")
    split = planned(moe, layout, {"m": GgmlType.Q8_0}, max_shard_bytes=1 << 20)
    report = export(moe, layout, split, tmp_path / "many", threads=2)
    assert len(report.files[0].parts) > 2
    one, many = read_gguf(tmp_path / "one" / "m.gguf"), open_gguf(tmp_path / "many" / report.files[0].parts[1])
    assert list(one.tensors) == list(many.tensors)
    assert all(one.read(name).tobytes() == many.read(name).tobytes() for name in one.tensors)
    assert counts(export(moe, layout, split, tmp_path / "many")) == {"m.gguf": (0, 0, 0, True)}


# ---------------------------------------------------------------- what goes wrong


FIVE = {"a": GgmlType.Q8_0, "b": GgmlType.Q4_K, "c": GgmlType.Q6_K, "d": GgmlType.IQ3_S, "e": GgmlType.IQ4_XS}
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from export.plain_layout import QUANTISER, demo, plain_layout, planned
from gemcut.export.run import export_gguf
from gemcut.ggml.library import load
from gemcut.ggml.types import GgmlType
moe = demo("moe")
layout = plain_layout(moe, 40)
kinds = {name: GgmlType[kind] for name, kind in (pair.split("=") for pair in sys.argv[3:])}
library = replace(load(), identity=QUANTISER)
export_gguf(moe, layout, planned(moe, layout, kinds), Path(sys.argv[2]), threads=2, library=library)
"""


@pytest.mark.slow
def test_kill_9_while_five_files_are_written(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    out = tmp_path / "o"
    pairs = [f"{name}={kind.name}" for name, kind in FIVE.items()]
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), str(out), *pairs]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    journal = out / "e.gguf.partial.jsonl"
    stop = time.monotonic() + 60
    while time.monotonic() < stop and child.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 12:
            break
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert contents(out) == {}
    for name in FIVE:
        with pytest.raises(CheckpointError, match="never finished"):
            read_gguf(out / f"{name}.gguf.partial")
    plans = planned(moe, layout, FIVE)
    report = export(moe, layout, plans, out)
    assert all(file.resumed >= 10 and file.quantised > 0 for file in report.files), report
    export(moe, layout, plans, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    assert not list(out.glob("*.partial*"))


def test_what_a_broken_off_run_left_is_held_against_its_hash(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout
) -> None:
    plans = planned(moe, layout, {"m": GgmlType.Q8_0})
    broken_off(moe, layout, plans, tmp_path)
    partial, ref = tmp_path / "m.gguf.partial", next(iter(plans[0].parts[0].tensors.values()))
    with open(partial, "r+b") as f:
        f.seek(ref.start)
        f.write(b"\xff\xff")
    report = export(moe, layout, plans, tmp_path)
    assert report.files[0].resumed > 0
    export(moe, layout, plans, tmp_path / "fresh")
    assert contents(tmp_path) == contents(tmp_path / "fresh")


class Stop(Exception):
    pass


def broken_off(checkpoint: Checkpoint, layout: GgufLayout, plans: list[Planned], out: Path) -> None:
    def progress(done: int, total: int, label: str) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        export(checkpoint, layout, plans, out, progress=progress)


def test_another_layout_starts_anew_over_what_was_left(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    broken_off(moe, layout, planned(moe, layout, {"m": GgmlType.Q8_0}), tmp_path)
    plans = planned(moe, layout, {"m": GgmlType.Q4_K})
    assert export(moe, layout, plans, tmp_path).files[0].resumed == 0
    export(moe, layout, plans, tmp_path / "fresh")
    assert contents(tmp_path) == contents(tmp_path / "fresh")


def test_a_kill_between_file_and_record_is_healed(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    plans = planned(moe, layout, {"m": GgmlType.Q8_0})
    broken_off(moe, layout, plans, tmp_path)
    journal = tmp_path / "m.gguf.partial.jsonl"
    head = journal.read_text().splitlines()[0]
    export(moe, layout, plans, tmp_path)
    record = tmp_path / "m.gguf.json"
    tensors = json.loads(record.read_text())["tensors"]
    lines = [
        json.dumps({"name": n, "kind": t["type"], "source": t["source"], "importance": "", "payload": t["payload"]})
        for n, t in tensors.items()
    ]
    wanted = record.read_text()
    record.unlink()
    journal.write_text("\n".join([head, *lines]) + "\n")
    assert export(moe, layout, plans, tmp_path).files[0].found
    assert record.read_text() == wanted
    assert not journal.exists()


def test_a_kill_between_two_parts_is_healed(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = planned(moe, layout, {"m": GgmlType.Q8_0}, max_shard_bytes=1 << 20)
    names = [part.name for part in plans[0].parts]
    replace = os.replace

    def killed(old: Path, new: Path) -> None:
        replace(old, new)
        if Path(new).name == names[1]:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("gemcut.store.os.replace", killed)
        with pytest.raises(Stop):
            export(moe, layout, plans, tmp_path)
    assert [(tmp_path / name).exists() for name in names[:2]] == [False, True]
    assert export(moe, layout, plans, tmp_path).files[0].resumed > 0
    export(moe, layout, plans, tmp_path / "fresh")
    assert contents(tmp_path) == contents(tmp_path / "fresh")
    (tmp_path / "m.gguf.json").unlink()
    with pytest.raises(UsageError, match="exists already"):
        export(moe, layout, planned(moe, layout, {"m": GgmlType.Q8_0}, max_shard_bytes=1 << 20), tmp_path)


def test_two_runs_do_not_write_one_file(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    plans = planned(moe, layout, {"m": GgmlType.Q8_0})
    other = Journal(tmp_path / "m.gguf.partial.jsonl", "of another run")
    with pytest.raises(UsageError, match="another run"):
        export(moe, layout, plans, tmp_path)
    assert not list(tmp_path.glob("*.gguf*.partial"))
    other.close()
    assert export(moe, layout, plans, tmp_path).files[0].quantised


def test_force_needs_the_room_of_a_new_file(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    (plan,) = planned(moe, layout, {"m": GgmlType.Q8_0})
    export(moe, layout, [plan], tmp_path)
    assert bytes_to_write(plan, tmp_path) == 0
    assert bytes_to_write(plan, tmp_path, force=True) == plan.size_bytes


def test_a_full_disk_is_a_typed_error_and_leaves_no_file(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    plans = planned(moe, layout, {"a": GgmlType.Q4_K, "b": GgmlType.Q8_0})
    limit = (plans[0].size_bytes + plans[1].size_bytes) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(MissingError, match="disk is full"):
            export(moe, layout, plans, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {}
    export(moe, layout, plans, tmp_path)
    assert len(contents(tmp_path)) == 2


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemcut.store.free_bytes", lambda path: 1000)
    with pytest.raises(MissingError, match="not enough disk space"):
        export(moe, layout, planned(moe, layout, {"a": GgmlType.Q4_K}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "kind"), [(np.nan, GgmlType.Q8_0), (np.inf, GgmlType.F32), (-np.inf, GgmlType.F16)])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, kind: GgmlType) -> None:
    weight = np.ones((3000, 256), np.float32)
    weight[2999, 7] = value
    checkpoint = made_checkpoint(tmp_path / "c", {"some.weight": weight})
    layout = made_layout(GgufTensor("w.weight", (3000, 256), "some.weight"))
    with pytest.raises(CheckpointError, match=r"some\.weight, row 2999, column 7"):
        export(checkpoint, layout, planned(checkpoint, layout, {"m": kind}), tmp_path / "o", threads=2)
    assert contents(tmp_path / "o") == {}


def test_what_cannot_be_planned_is_refused(moe: Checkpoint, layout: GgufLayout) -> None:
    types = plain_types(layout, GgmlType.Q8_0)

    def plan(target: Target) -> Planned:
        return plan_target(target, layout, parent="p", quantiser=QUANTISER)

    with pytest.raises(UsageError, match="no type"):
        plan(Target("m.gguf", {}, METADATA))
    with pytest.raises(UsageError, match="not the name"):
        plan(Target("../m.gguf", types, METADATA))
    with pytest.raises(UsageError, match="needs an importance matrix"):
        plan(Target("m.gguf", plain_types(layout, GgmlType.IQ2_XS), METADATA))

    class Narrow:
        def importance(self, name: str, unit: int = 0) -> np.ndarray:
            return np.ones(7, np.float32)

    with pytest.raises(UsageError, match="another model"):
        plan(Target("m.gguf", plain_types(layout, GgmlType.Q4_K), METADATA, Narrow()))


def test_importances_change_nothing_where_the_type_does_not_look_at_them(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout
) -> None:
    for kind in (GgmlType.Q8_0, GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.MXFP4, GgmlType.NVFP4):
        values = np.random.default_rng(int(kind)).normal(size=(4, 512)).astype(np.float32)
        rooms = [np.empty(tensor_bytes(kind, values.shape), np.uint8) for _ in range(2)]
        quantise(values, kind, None, rooms[0])
        quantise(values, kind, np.linspace(0.01, 9, 512, dtype=np.float32), rooms[1])
        assert rooms[0].tobytes() == rooms[1].tobytes(), kind
