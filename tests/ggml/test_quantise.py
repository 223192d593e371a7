"""Quantised bytes: those of llama.cpp, for every type, however the rows are shared out; and no input that kills."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.errors import CheckpointError, UsageError
from gemcut.ggml import quantise as module
from gemcut.ggml.library import load
from gemcut.ggml.quantise import IMPORTANCE_LIMIT, VALUE_LIMIT, dequantise, quantise, requires_imatrix
from gemcut.ggml.types import BLOCKS, NEED_IMATRIX, GgmlType, tensor_bytes
from gemcut.types import F32

KINDS = [kind for kind in GgmlType if kind not in module._NO_QUANTISER]
# Their tables take up to twenty seconds to build, once per process.
LARGE_TABLES = {GgmlType.IQ1_S, GgmlType.IQ1_M, GgmlType.IQ2_S, GgmlType.IQ2_XS, GgmlType.IQ2_XXS}
QUICK = [kind for kind in KINDS if kind not in LARGE_TABLES]
EVERY = [pytest.param(k, marks=[pytest.mark.slow] if k in LARGE_TABLES else [], id=k.name) for k in KINDS]

# First 16 digits of the SHA-256 of rows() quantised by a build of llama.cpp of its own (0.5.0-dev, its libllama), not
# by the wheel: without importances, and with them.
GOLDEN: dict[GgmlType, tuple[str | None, str]] = {
    GgmlType.F32: ("c8705ca61310af92", "c8705ca61310af92"),
    GgmlType.F16: ("0686746b6b7037af", "0686746b6b7037af"),
    GgmlType.Q4_0: ("02bc4f21d5320365", "5809a40c890f0b0e"),
    GgmlType.Q4_1: ("178faf8cc7850c2d", "01da6d90ca0fd04d"),
    GgmlType.Q5_0: ("4dabd3d3acf734f4", "910801e3c05055e4"),
    GgmlType.Q5_1: ("1773005a525e1f56", "d887845d7277c059"),
    GgmlType.Q8_0: ("1513fe0c9cea91c5", "1513fe0c9cea91c5"),
    GgmlType.Q2_K: ("fee19b41fb79a4cd", "3b8ba6cf8bee3383"),
    GgmlType.Q3_K: ("876772649974f5e9", "08f0c3f7b58c72c6"),
    GgmlType.Q4_K: ("bc129635bf7cafd3", "a32b0a57a264fecc"),
    GgmlType.Q5_K: ("1f9b6f8e5abeb54c", "71573407b8ee5dde"),
    GgmlType.Q6_K: ("b471f72f5868f5a3", "c3096c8a6da9bc2e"),
    GgmlType.IQ2_XXS: (None, "522c7ae716d31771"),
    GgmlType.IQ2_XS: (None, "481d688dd40f759a"),
    GgmlType.IQ3_XXS: ("fa5532d79e69ee1b", "e41e0d9880e56e98"),
    GgmlType.IQ1_S: (None, "5af538e95ade1d66"),
    GgmlType.IQ4_NL: ("86ac49621ec034c9", "83e9831740a4a6be"),
    GgmlType.IQ3_S: ("80377f1340b43f37", "5b7dbbced1c1f823"),
    GgmlType.IQ2_S: ("474ff694031ee607", "45f97d4996bb10d0"),
    GgmlType.IQ4_XS: ("260a4ac3fa487c16", "38f6f36d54222bed"),
    GgmlType.IQ1_M: ("875e0f20509b3062", "fa618ae87a9f9b1d"),
    GgmlType.BF16: ("e3a7460491a5a768", "e3a7460491a5a768"),
    GgmlType.TQ1_0: ("35b105566d4d9a01", "35b105566d4d9a01"),
    GgmlType.TQ2_0: ("53c1bd04bf92d3c2", "53c1bd04bf92d3c2"),
    GgmlType.MXFP4: ("d1c09d7f022b4821", "d1c09d7f022b4821"),
    GgmlType.NVFP4: ("6f36b3973bd403b6", "6f36b3973bd403b6"),
    GgmlType.Q1_0: ("b685d2ce24765df3", "b685d2ce24765df3"),
    GgmlType.Q2_0: ("cb501df3ade25121", "cb501df3ade25121"),
}


def uniform(count: int, salt: int) -> F32:
    """float32 in [0, 1) by integer arithmetic only: the same on every machine and numpy."""
    i = np.arange(count, dtype=np.uint64) + np.uint64(salt << 32)
    h = i * np.uint64(0x9E3779B97F4A7C15)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(32)
    return (h >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def rows(count: int = 6, columns: int = 512) -> F32:
    u = uniform(count * columns, 1) - np.float32(0.5)
    return (u * u * u * np.float32(0.5)).reshape(count, columns)


def stored(values: F32, kind: GgmlType, importance: F32 | None, threads: int = 1) -> bytes:
    out = bytearray(tensor_bytes(kind, values.shape))
    quantise(values, kind, importance, memoryview(out), threads=threads)
    return bytes(out)


def in_one_call(values: F32, kind: GgmlType, importance: F32 | None) -> bytes:
    dll = load().dll
    out = np.zeros(tensor_bytes(kind, values.shape), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    dll.ggml_quantize_chunk(kind, values.ctypes.data, out.ctypes.data, 0, *values.shape, weights)
    return out.tobytes()


@pytest.mark.parametrize("kind", EVERY)
def test_bytes_are_those_of_llama_cpp(kind: GgmlType) -> None:
    without, with_importance = GOLDEN[kind]
    assert hashlib.sha256(stored(rows(), kind, uniform(512, 2))).hexdigest()[:16] == with_importance
    if without is None:
        assert requires_imatrix(kind)
    else:
        assert hashlib.sha256(stored(rows(), kind, None)).hexdigest()[:16] == without


def test_the_types_that_need_importances_are_the_library_s() -> None:
    dll = load().dll
    assert {kind for kind in GgmlType if dll.ggml_quantize_requires_imatrix(kind)} == NEED_IMATRIX


def check_sharing(kind: GgmlType, count: int, blocks: int, threads: int, piece: int, weighted: bool) -> None:
    columns = blocks * BLOCKS[kind].values
    values, importance = rows(count, columns), uniform(columns, 2) if weighted or requires_imatrix(kind) else None
    whole = in_one_call(values, kind, importance)
    before, module._PIECE = module._PIECE, piece
    try:
        assert stored(values, kind, importance, threads) == whole
    finally:
        module._PIECE = before
    assert b"".join(stored(values[i : i + 1], kind, importance) for i in range(count)) == whole


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(QUICK), count=st.integers(1, 9), blocks=st.integers(1, 3), threads=st.integers(1, 4),
    piece=st.sampled_from([1, 300, 2000]), weighted=st.booleans(),
)  # fmt: skip
def test_threads_and_pieces_change_nothing(
    kind: GgmlType, count: int, blocks: int, threads: int, piece: int, weighted: bool
) -> None:
    check_sharing(kind, count, blocks, threads, piece, weighted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LARGE_TABLES), ids=lambda k: k.name)
def test_threads_change_nothing_with_large_tables(kind: GgmlType) -> None:
    check_sharing(kind, count=5, blocks=2, threads=2, piece=600, weighted=True)


@pytest.mark.parametrize("kind", EVERY)
def test_dequantised_values_are_those_of_the_format_s_own_package(kind: GgmlType) -> None:
    from gguf import GGMLQuantizationType
    from gguf import dequantize as reference

    raw = np.frombuffer(stored(rows(), kind, uniform(512, 2)), np.uint8)
    got = dequantise(raw, kind, (2, 3, 512))
    assert got.shape == (2, 3, 512)
    assert got.dtype == np.float32
    error = float(np.abs(got.reshape(6, 512) - rows()).mean() / np.abs(rows()).mean())
    assert error < (1.0 if kind.name.startswith(("TQ", "Q1", "Q2_0", "IQ1")) else 0.7)
    if kind.name not in ("Q1_0", "Q2_0"):  # the package does not know these two
        wanted = reference(raw.reshape(6, -1), GGMLQuantizationType[kind.name])
        np.testing.assert_allclose(got.reshape(6, 512), wanted, rtol=2e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(QUICK), scale=st.sampled_from([1e-30, 1e-3, 1.0, 6e4]), seed=st.integers(0, 99))
def test_one_value_that_is_not_finite_is_refused_and_named(kind: GgmlType, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.random((5, 512)) * scale).astype(np.float32)
    row, column = int(rng.integers(5)), int(rng.integers(512))
    values[row, column] = rng.choice([np.nan, np.inf, -np.inf])
    out = bytearray(tensor_bytes(kind, values.shape))
    with pytest.raises(CheckpointError, match=rf"blk\.0\.x, first at row {row}, column {column}"):
        quantise(values, kind, np.ones(512, np.float32), memoryview(out), name="blk.0.x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, IMPORTANCE_LIMIT * 2])
def test_an_importance_that_cannot_be_used_is_refused(value: float) -> None:
    importance = np.ones(512, np.float32)
    importance[77] = value
    with pytest.raises(CheckpointError, match="column 77"):
        stored(rows(), GgmlType.Q4_K, importance)


def test_values_that_a_type_cannot_hold_are_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be quantised"):
        stored(rows() * np.float32(1e8), GgmlType.Q4_K, None)
    with pytest.raises(CheckpointError, match="cannot be quantised"):
        stored(rows() * np.float32(1e8), GgmlType.F16, None)
    large = np.full((1, 32), 3e38, np.float32)
    raw = np.frombuffer(stored(large, GgmlType.F32, None), np.uint8)
    assert np.array_equal(dequantise(raw, GgmlType.F32, (1, 32)), large)
    raw = np.frombuffer(stored(large, GgmlType.BF16, None), np.uint8)
    np.testing.assert_allclose(dequantise(raw, GgmlType.BF16, (1, 32)), large, rtol=0.01)


def test_calls_that_do_not_fit_are_refused() -> None:
    x = rows()
    out = bytearray(tensor_bytes(GgmlType.Q8_0, x.shape))
    short = memoryview(out)[:-1]
    with pytest.raises(UsageError, match="another size"):
        quantise(x, GgmlType.Q8_0, None, short)
    with pytest.raises(UsageError, match="another size"):
        quantise(x, GgmlType.Q8_0, None, memoryview(bytes(out)))
    with pytest.raises(UsageError, match="500 columns"):
        quantise(np.ascontiguousarray(x[:, :500]), GgmlType.Q4_K, None, memoryview(out))
    with pytest.raises(UsageError, match="rows of float32"):
        quantise(x[:, ::2], GgmlType.Q8_0, None, memoryview(out))
    with pytest.raises(UsageError, match="rows of float32"):
        quantise(x.astype(np.float64), GgmlType.Q8_0, None, memoryview(out))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="importances of another shape"):
        stored(x, GgmlType.Q4_K, np.ones(256, np.float32))
    with pytest.raises(UsageError, match="needs an importance matrix"):
        stored(x, GgmlType.IQ2_XXS, None)
    with pytest.raises(UsageError, match="nothing is quantised"):
        quantise(x, GgmlType.I32, None, memoryview(bytearray(x.nbytes)))
    with pytest.raises(UsageError, match="bytes of a Q8_0 tensor"):
        dequantise(np.zeros(33, np.uint8), GgmlType.Q8_0, (1, 32))


def hostile(rng: np.random.Generator, how: str) -> F32:
    """float32 [3, 512] at the edges of what is accepted."""
    x = rng.standard_normal((3, 512))
    top = VALUE_LIMIT * 0.99
    if how == "tiny":
        x = x * 1e-42
    elif how == "wide":
        x = x * 10.0 ** rng.uniform(-44, 5, x.shape)
    elif how == "sparse":
        x = np.where(rng.random(x.shape) < 0.02, x * 10.0 ** rng.uniform(-40, 5), 0)
    elif how == "equal":
        x = np.full_like(x, rng.choice([0.0, 1.0, -1e-30, top]))
    elif how == "outlier":
        x[rng.integers(3), rng.integers(512)] = rng.choice([-top, top])
    return np.clip(x, -top, top).astype(np.float32)


def weights_of(rng: np.random.Generator, how: str) -> F32 | None:
    """float32 [512] of importances, or None."""
    if how == "none":
        return None
    if how == "wide":
        return (10.0 ** rng.uniform(-44, 12, 512)).clip(0, IMPORTANCE_LIMIT).astype(np.float32)
    level = {"zero": 0.0, "huge": IMPORTANCE_LIMIT, "tiny": 1e-44}[how]
    return np.full(512, level, np.float32)


def check_hostile(kind: GgmlType, seed: int) -> None:
    """Bytes of finite values, or a refusal; an abort would end the test run."""
    rng = np.random.default_rng(seed)
    for how in ("tiny", "wide", "sparse", "equal", "outlier"):
        for weighted in ("none", "wide", "zero", "huge", "tiny"):
            importance = weights_of(rng, weighted)
            if importance is None and requires_imatrix(kind):
                continue
            values = hostile(rng, how)
            try:
                raw = stored(values, kind, importance)
            except CheckpointError:
                blocks = np.abs(values).reshape(-1, 32).max(1)
                # a scale of 16 bits ends at 65504; one of 8 bits has no exponent for blocks below 2^-125
                faint = kind is GgmlType.MXFP4 and bool(((blocks > 0) & (blocks < 2.0**-124)).any())
                assert blocks.max() > 3e4 or faint, f"{how}, {weighted}"
                continue
            assert np.isfinite(dequantise(np.frombuffer(raw, np.uint8), kind, (3, 512))).all(), f"{how}, {weighted}"


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(QUICK), seed=st.integers(0, 9999))
def test_nothing_that_is_accepted_aborts(kind: GgmlType, seed: int) -> None:
    check_hostile(kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LARGE_TABLES), ids=lambda k: k.name)
def test_nothing_that_is_accepted_aborts_with_large_tables(kind: GgmlType) -> None:
    for seed in range(4):
        check_hostile(kind, seed)
