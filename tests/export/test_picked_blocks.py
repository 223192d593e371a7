"""Importances with roundings through the exporter: files of the same size and form, other bytes where it pays."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.plain_layout import QUANTISER, demo, plain_layout, planned
from gemcut.checkpoint import Checkpoint
from gemcut.export.imatrix import Entry, Imatrix, Inputs
from gemcut.export.imatrix.blocks import Roundings, quantise_blocks, roundings
from gemcut.export.run import export_gguf
from gemcut.export.source import PIECE_ELEMENTS
from gemcut.exporting import Export, estimate
from gemcut.families.gguf import GgufLayout
from gemcut.ggml.library import load
from gemcut.ggml.types import GgmlType, tensor_bytes
from gemcut.gguf_file import read_gguf

LIBRARY = replace(load(), identity=QUANTISER)


@pytest.fixture(scope="module")
def moe() -> Checkpoint:
    return demo("moe")


@pytest.fixture(scope="module")
def layout(moe: Checkpoint) -> GgufLayout:
    return plain_layout(moe, 20)


def importances(layout: GgufLayout) -> Imatrix:
    """Eight roundings, by inputs with a mean; of every second tensor."""
    rng = np.random.default_rng(0)
    entries, inputs = {}, {}
    for i, tensor in enumerate(t for t in layout.tensors if len(t.shape) > 1):
        shape = (tensor.shape[0] if len(tensor.shape) == 3 else 1, tensor.shape[-1])
        mean = rng.standard_normal(shape).astype(np.float32)
        spread = rng.random(shape, np.float32)
        entries[tensor.name] = Entry(mean**2 + spread, np.ones(shape[0], np.int64))
        if i % 2 == 0:
            inputs[tensor.name] = Inputs(mean, spread)
    return Imatrix(entries, roundings=4, inputs=inputs)


def test_threads_change_nothing_and_only_tensors_with_inputs_differ(
    tmp_path: Path, moe: Checkpoint, layout: GgufLayout
) -> None:
    picked = importances(layout)
    plans = planned(moe, layout, {"m": GgmlType.Q4_0}, picked)
    for threads in (1, 3):
        export_gguf(moe, layout, plans, tmp_path / str(threads), threads=threads, library=LIBRARY)
    once = planned(moe, layout, {"m": GgmlType.Q4_0}, replace(picked, roundings=1))
    export_gguf(moe, layout, once, tmp_path / "once", library=LIBRARY)
    files = {name: (tmp_path / name / "m.gguf").read_bytes() for name in ("1", "3", "once")}
    assert files["1"] == files["3"]
    assert len(files["1"]) == len(files["once"])
    a, b = read_gguf(tmp_path / "1" / "m.gguf"), read_gguf(tmp_path / "once" / "m.gguf")
    differ = {name for name in a.tensors if a.read(name).tobytes() != b.read(name).tobytes()}
    assert differ == {name for name in picked.inputs if a.tensors[name].kind is GgmlType.Q4_0}


def test_a_dry_run_counts_the_room_of_roundings(tmp_path: Path, moe: Checkpoint, layout: GgufLayout) -> None:
    picked = importances(layout)
    needed = []
    for given in (replace(picked, roundings=1), picked):
        export = Export(moe, layout, tuple(planned(moe, layout, {"m": GgmlType.Q4_0}, given)))
        needed.append(estimate((export,), tmp_path, 2).memory_bytes)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((PIECE_ELEMENTS // 256, 256), np.float32)
    ones = np.ones(256, np.float32)
    out = np.empty(tensor_bytes(GgmlType.Q4_0, values.shape), np.uint8)
    tracemalloc.start()
    quantise_blocks(values, GgmlType.Q4_0, Roundings(roundings(rng.random(256, np.float32), 4), ones, ones), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= (needed[1] - needed[0]) // 2 < 4 * peak


def test_roundings_are_part_of_what_a_tensor_is_found_again_by(moe: Checkpoint, layout: GgufLayout) -> None:
    picked = importances(layout)
    (a,) = planned(moe, layout, {"m": GgmlType.Q4_0}, picked)
    (b,) = planned(moe, layout, {"m": GgmlType.Q4_0}, replace(picked, roundings=5))
    (c,) = planned(moe, layout, {"m": GgmlType.Q4_0}, replace(picked, inputs={}))
    for name in picked.inputs:
        if a.importance[name]:
            assert len({one.importance[name] for one in (a, b, c)}) == 3
    assert len({one.settings for one in (a, b, c)}) == 3
