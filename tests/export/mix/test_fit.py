"""The terms against what llama.cpp says of the demo models (llama-perplexity -v of the version we compare with)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemcut.checkpoint import open_checkpoint
from gemcut.errors import UsageError
from gemcut.export.layout import layout_of
from gemcut.export.mix.fit import weights_budget
from gemcut.families.gguf import GgufLayout, Value
from gemcut.ggml.types import GgmlType

DEMO = Path(__file__).parents[3] / "demo"
MIB = 1 << 20


@pytest.fixture(scope="module")
def layouts() -> dict[str, GgufLayout]:
    return {kind: layout_of(open_checkpoint(DEMO / kind)) for kind in ("dense", "moe")}


# model, context, batch; KV cache of full and sliding layers in q8_0, compute buffer: MiB, as llama.cpp reports them
REPORTED = [
    ("dense", 512, 512, 0.27, 1.33, 9.50),
    ("dense", 4096, 512, 2.12, 1.99, 13.00),
    ("dense", 32768, 512, 17.00, 1.99, 37.27),
    ("moe", 512, 512, 0.13, 0.66, 10.44),
    ("moe", 4096, 512, 1.06, 1.00, 9.81),
    ("moe", 32768, 512, 8.50, 1.00, 36.88),
]


@pytest.mark.parametrize(("kind", "context", "batch", "full", "sliding", "compute"), REPORTED)
def test_terms_are_those_llama_cpp_reports(
    layouts: dict[str, GgufLayout], kind: str, context: int, batch: int, full: float, sliding: float, compute: float
) -> None:
    fit = weights_budget(layouts[kind], 1 << 33, context=context, cache=GgmlType.Q8_0, batch=batch)
    terms = {term.name: term.size_bytes / MIB for term in fit.terms}
    assert terms["KV cache, full layers"] == pytest.approx(full, abs=0.006)
    assert terms["KV cache, sliding layers"] == pytest.approx(sliding, abs=0.006)
    assert compute <= terms["compute buffer (estimate)"] <= 1.5 * compute


def test_everything_is_shown_and_adds_up(layouts: dict[str, GgufLayout]) -> None:
    others = {"mmproj.gguf": 7_000_000, "drafter.gguf": 3_000_000}
    fit = weights_budget(layouts["moe"], 1 << 30, context=4096, others=others, sequences=2)
    assert fit.weights_bytes + sum(term.size_bytes for term in fit.terms) == fit.memory_bytes
    assert {"mmproj.gguf", "drafter.gguf", "reserve"} <= {term.name for term in fit.terms}
    alone = weights_budget(layouts["moe"], 1 << 30, context=4096, others=others)
    assert fit.terms[0].size_bytes == 2 * alone.terms[0].size_bytes
    assert "2 sequences" in fit.terms[0].how


def test_f16_takes_what_two_bytes_take(layouts: dict[str, GgufLayout]) -> None:
    f16 = weights_budget(layouts["dense"], 1 << 30, context=1024, cache=GgmlType.F16)
    q8 = weights_budget(layouts["dense"], 1 << 30, context=1024, cache=GgmlType.Q8_0)
    assert f16.terms[0].size_bytes * 34 == q8.terms[0].size_bytes * 64


def test_layers_that_share_keys_have_no_cache(layouts: dict[str, GgufLayout]) -> None:
    shared = dict(layouts["dense"].metadata) | {"gemma4.attention.shared_kv_layers": Value("u32", 6)}
    half = weights_budget(replace(layouts["dense"], metadata=shared), 1 << 30, context=4096)
    whole = weights_budget(layouts["dense"], 1 << 30, context=4096)
    assert [2 * t.size_bytes for t in half.terms[:2]] == [t.size_bytes for t in whole.terms[:2]]


def test_too_little_memory_says_what_takes_most(layouts: dict[str, GgufLayout]) -> None:
    with pytest.raises(UsageError, match="nothing is left for the weights") as refused:
        weights_budget(layouts["dense"], 64 * MIB, context=1 << 20, reserve_bytes=0)
    assert "compute buffer" in str(refused.value.hint)


@pytest.mark.parametrize(
    "asked",
    [{"context": 0}, {"context": 512, "cache": GgmlType.Q4_K}, {"context": 512, "sequences": 0}],
)
def test_questions_without_sense_are_refused(layouts: dict[str, GgufLayout], asked: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        weights_budget(layouts["dense"], 1 << 30, **asked)  # type: ignore[arg-type]


def test_a_cache_type_must_fit_the_heads(layouts: dict[str, GgufLayout]) -> None:
    odd = dict(layouts["dense"].metadata) | {"gemma4.attention.key_length": Value("u32", 40)}
    with pytest.raises(UsageError, match="does not fit these heads") as refused:
        weights_budget(replace(layouts["dense"], metadata=odd), 1 << 30, context=512, cache=GgmlType.Q8_0)
    assert refused.value.where == "layer 5"
