from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import make_tiny

from export.mix.goldens import layout as golden
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix import Entry, Imatrix
from gemcut.export.layout import layout_of
from gemcut.export.mix.measure import measure_damages
from gemcut.export.mix.padding import UNPADDED_KEY, PaddedImportances, grow_margins, pad_experts
from gemcut.export.mix.shapes import quantisable
from gemcut.export.mix.sizes import file_size
from gemcut.export.mix.solver import solve
from gemcut.export.mix.stock import stock_types
from gemcut.export.source import Buffers, Piece, Source
from gemcut.export.targets import units
from gemcut.exporting import GgufWords, costs_of, plan_export, write_export
from gemcut.families.gguf import GgufLayout, Grown, Value
from gemcut.ggml.model import Model
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import read_gguf
from gemcut.records.curvature import Curvature, Margins
from gemcut.reporting import bit_cells


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("pad") / "moe", "moe-text", hidden_size=256))


@pytest.fixture(scope="module")
def layout(model: Checkpoint) -> GgufLayout:
    return layout_of(model)


def stored(model: Checkpoint, source: str) -> np.ndarray:
    halves = model.read(source).view("<u2").astype(np.uint32) << 16
    return halves.view(np.float32).reshape(model.ref(source).shape)


def test_only_experts_grow_and_the_file_says_so(layout: GgufLayout) -> None:
    key = "gemma4.expert_feed_forward_length"
    width = layout.metadata[key].value
    padded = pad_experts(layout)
    assert padded.metadata[key] == Value("u32", 256)
    assert padded.metadata[UNPADDED_KEY] == Value("u32", width)
    for before, after in zip(layout.tensors, padded.tensors, strict=True):
        assert after.weights == before.weights == prod(before.shape)
        if before.role not in ("ffn_gate_up_exps", "ffn_down_exps"):
            assert after is before
        elif before.role == "ffn_down_exps":
            assert after.shape == (*before.shape[:-1], 256)
        else:
            assert after.shape == (before.shape[0], 512, before.shape[2])


@pytest.mark.parametrize("rows", [1, 7, 100, 256, 700, 10_000])
def test_values_are_those_stored_with_zeros_behind(model: Checkpoint, layout: GgufLayout, rows: int) -> None:
    padded = pad_experts(layout)
    for tensor in (t for t in padded.tensors if t.grown is not None and t.layer == 0):
        plain = stored(model, str(tensor.source))
        wanted = np.zeros(tensor.shape, np.float32)
        if tensor.role == "ffn_down_exps":
            wanted[..., : plain.shape[-1]] = plain
        else:
            half = plain.shape[1] // 2
            wanted[:, :half], wanted[:, 256 : 256 + half] = plain[:, :half], plain[:, half:]
        source, parts = Source(model, tensor, Buffers()), []
        for first in range(0, source.rows, rows):
            piece = Piece(first, min(first + rows, source.rows))
            loaded = source.load(piece)
            assert loaded.digest == source.hash(piece)
            assert loaded.raw is None
            parts.append(loaded.values.copy())
        np.testing.assert_array_equal(np.concatenate(parts), wanted.reshape(-1, tensor.shape[-1]))


def test_a_padded_file_computes_the_same(model: Checkpoint, layout: GgufLayout, tmp_path: Path) -> None:
    tokens = np.arange(5, 45, dtype=np.int64)
    logits = []
    seen: list[tuple[int, int]] = []
    for pad in (False, True):
        words = GgufWords(("F32",), pad_experts=pad)
        (export,) = plan_export(model, words)
        (report,) = write_export((export,), tmp_path, threads=1, progress=lambda *said: seen.append(said[:2]))
        assert report.read_bytes == export.read_bytes  # the zeros are not read
        assert max(seen) == seen[-1] == (export.read_bytes, export.read_bytes)
        seen.clear()
        path = tmp_path / export.planned[0].target.name
        assert path.name.endswith("-padded.gguf") == pad
        weights = sum(prod(tensor.shape) for tensor in layout.tensors)  # with or without zeros
        assert export.planned[0].bits_per_weight == 8 * export.planned[0].payload_bytes / weights
        (cost,) = costs_of((export,))
        assert sum(kind.elements for kind in cost.kinds) == weights
        assert read_gguf(path).value("gemma4.expert_feed_forward_length") == (256 if pad else 32)
        with Model(path, threads=1, context=64) as one:
            logits.append(one.logits(tokens))
    assert np.ptp(logits[0]) > 0.1
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5)


def test_the_map_of_bits_counts_no_zeros(model: Checkpoint, layout: GgufLayout, tmp_path: Path) -> None:
    (export,) = plan_export(model, GgufWords(("Q8_0",), pad_experts=True))
    write_export((export,), tmp_path, threads=1)
    file = read_gguf(tmp_path / export.planned[0].target.name)
    weights = {tensor.name: prod(tensor.shape) for tensor in layout.tensors}
    refs = [ref for ref in file.tensors.values() if len(ref.shape) > 1 and ref.kind is not GgmlType.F32]
    assert any(prod(ref.shape) > weights[ref.name] for ref in refs)
    assert [(one.elements, one.bpw) for one in bit_cells(file)] == [
        (weights[ref.name], 8 * ref.size_bytes / weights[ref.name]) for ref in refs
    ]


@pytest.fixture(scope="module")
def wide() -> GgufLayout:
    """The expert width of the real model: 704."""
    plain = golden("26B-A4B")
    roles = {name: name.split(".")[-2] for name in (t.name for t in plain.tensors) if name.endswith(".weight")}
    tensors = tuple(replace(t, role=roles.get(t.name, "")) for t in plain.tensors)
    return replace(plain, tensors=tensors, metadata={"gemma4.expert_feed_forward_length": Value("u32", 704)})


def test_a_size_out_of_reach_names_padding_where_few_zeros_would_do(wide: GgufLayout, layout: GgufLayout) -> None:
    for one, said in ((wide, True), (pad_experts(wide), False), (layout, False), (golden("31B"), False)):
        damages = {(tensor.name, GgmlType.Q8_0): 1.0 for tensor in one.tensors if quantisable(tensor)}
        with pytest.raises(UsageError) as refused:
            solve(one, damages, 1000)
        assert ("padded experts" in str(refused.value.hint)) == said


def test_small_types_fit_and_what_that_saves(wide: GgufLayout) -> None:
    plain, padded = wide, pad_experts(wide)
    shares = {}
    for name in ("IQ2_M", "IQ2_XS", "Q4_K_M", "IQ4_XS"):
        before, after = (file_size(0, stock_types(name, one, imatrix=True), one).size_bytes for one in (plain, padded))
        shares[name] = after / before
    assert shares["IQ2_M"] < 0.9
    assert shares["IQ2_XS"] < 0.86
    assert shares["IQ4_XS"] > 1.05
    assert stock_types("IQ2_M", padded, imatrix=True)["blk.9.ffn_down_exps.weight"].name == "IQ2_S"


def test_damages_of_padded_experts_serve_the_others_where_they_fit(model: Checkpoint, layout: GgufLayout) -> None:
    padded, kinds = pad_experts(layout), (GgmlType.Q8_0, GgmlType.Q4_K)
    tensors = {
        str(t.source): Margins(np.ones((units(t), t.shape[-2])), np.ones((units(t), t.shape[-1])))
        for t in layout.tensors
        if quantisable(t)
    }
    curved = Curvature(tensors, 100, 1, 4, "float32", 0, model.fingerprint, "c" * 64, fingerprint="f" * 64)
    first = measure_damages(model, padded, curved, kinds=kinds)
    assert ("blk.0.ffn_down_exps.weight", GgmlType.Q4_K) in first.values
    fresh = measure_damages(model, layout, curved, kinds=kinds)
    again = measure_damages(model, layout, curved, kinds=kinds, earlier=first)
    assert again.values == pytest.approx(fresh.values)
    smallest = solve(layout, again.values, 10**9).least_bytes
    assert solve(layout, again.values, smallest).types["blk.0.ffn_down_exps.weight"] == GgmlType.Q8_0


def test_what_needs_no_padding_is_refused(layout: GgufLayout) -> None:
    with pytest.raises(UsageError, match="need no padding"):
        pad_experts(pad_experts(layout))
    with pytest.raises(UsageError, match="no experts of one width"):
        pad_experts(golden("31B"))


def test_importances_of_added_columns_are_zero(layout: GgufLayout) -> None:
    padded = pad_experts(layout)
    entries = {
        t.name: Entry(np.ones((t.shape[0], t.shape[-1]), np.float32), np.full(t.shape[0], 2))
        for t in layout.tensors
        if t.role in ("ffn_down_exps", "ffn_gate_up_exps")
    }
    given = PaddedImportances.of(Imatrix(entries), padded)
    found = given.importance("blk.0.ffn_down_exps.weight", 1)
    assert found is not None
    assert found.shape == (256,)
    assert (found[:32] == 0.5).all()
    assert not found[32:].any()
    assert given.importance("blk.0.ffn_gate_up_exps.weight").shape == (256,)  # type: ignore[union-attr]
    assert given.importance("blk.0.attn_q.weight") is None


def test_curvature_of_zeros_is_none() -> None:
    margins = Margins(np.arange(8.0).reshape(2, 4), np.arange(6.0).reshape(2, 3))
    grown = grow_margins(margins, Grown((2, 3), (3, 5)))
    np.testing.assert_array_equal(grown.rows, [[0, 1, 0, 2, 3, 0], [4, 5, 0, 6, 7, 0]])
    np.testing.assert_array_equal(grown.columns, [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]])
