"""Names taken apart as llama.cpp's converter does, whose own function is in the gguf package."""

from __future__ import annotations

import pytest
from gguf.metadata import Metadata
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.export.model_name import name_parts, title


@pytest.mark.parametrize(
    ("model_id", "parameters", "parts"),
    [
        (
            "google/gemma-4-26B-A4B-it",
            25_200_000_000,
            ("gemma-4-26B-A4B-it", "google", "gemma-4", "it", None, "26B-A4B"),
        ),
        ("gemma-4-31B", 31_000_000_000, ("gemma-4-31B", None, "gemma-4", None, None, "31B")),
        (
            "gemma-4-26B-A4B-it-109e-v2",
            21_000_000_000,
            ("gemma-4-26B-A4B-it-109e-v2", None, "gemma-4", "it-109e", "v2", "26B-A4B"),
        ),
        (
            "org/some-model-7b1-instruct",
            7_100_000_000,
            ("some-model-7b1-instruct", "org", "some-model", "instruct", None, "7.1B"),
        ),
        ("Model-Q4_K-large-7B", 7_000_000_000, ("Model-Q4_K-large-7B", None, "Model", "large", None, "7B")),
        ("model-128k-chat", 7_000_000_000, ("model-128k-chat", None, "model", "128k-chat", None, None)),
        ("./x-1B", 1_000_000_000, ("x-1B", None, "x", None, None, "1B")),
        ("plain", 5, ("plain", None, None, None, None, None)),
        ("A human name", 5, ("A human name", None, None, None, None, None)),
        ("gemma-E2B-v1.5", 5_000_000_000, ("gemma-E2B-v1.5", None, "gemma-E2B", None, "v1.5", None)),
        ("dense", 8_300_000, ("dense", None, None, None, None, None)),
        ("-", 5, ("-", None, None, None, None, None)),
    ],
)
def test_parts(model_id: str, parameters: int, parts: tuple[str | None, ...]) -> None:
    found = name_parts(model_id, parameters)
    assert (found.name, found.organization, found.basename, found.finetune, found.version, found.size_label) == parts


WORDS = (
    "gemma", "4", "v2", "26B", "A4B", "it", "instruct", "31b", "Q4_K", "bf16", "2.0", "small", "mini", "109e", "E2B",
    "128k", "7b1", "8x7B", "coder", "V1.5", "x", "large", "Pruned", "iter3", "3n", "0_5B", "1M", "",
)  # fmt: skip


@settings(max_examples=500)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    start=st.sampled_from(("", "org/", "./", "a/b/")),
    parameters=st.sampled_from((0, 1000, 8_000_000, 25_000_000_000)),
)
def test_any_name_as_the_converter_does(words: list[str], start: str, parameters: int) -> None:
    model_id = start + "-".join(words)
    theirs = Metadata.get_model_id_components(model_id, parameters)
    found = name_parts(model_id, parameters)
    ours = (found.name, found.organization, found.basename, found.finetune, found.version, found.size_label)
    assert ours == tuple(part or None for part in theirs)
    assert title(model_id) == Metadata.id_to_title(model_id)


def test_titles() -> None:
    assert title("gemma-4-26B-A4B-it") == "Gemma 4 26B A4B It"
    assert title("v2.1-coder 4k") == "v2.1 Coder 4k"
