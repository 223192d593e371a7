"""Broken folders: anything in any place of config, tokenizer, sampling and card ends in a typed error, or in metadata
whose values fit their types."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from families.gguf_shapes import drafter, tower, trunk
from gemcut.errors import GemcutError
from gemcut.export.metadata import file_metadata
from gemcut.families import gguf_layout, gguf_vision_layout
from gemcut.families.gguf import Value
from tiny import make_tokenizer

MUTANTS = 1500
JUNK: tuple[Any, ...] = (
    None, -1, 0, 1, 2**40, 2**70, "", "x", "<bos>", [], {}, True, 1.5, 1e308, -0.0, [1], {"a": 1}, [None], "\0",
    "é" * 50, ["a", "b"], {"content": "<bos>"}, {"content": 3}, [{"id": 0, "content": "z"}],
)  # fmt: skip
PYTHON: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "f32": (int, float)}


def places(value: Any, rng: random.Random, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to members, a sample of them where there are many."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    keys = rng.sample(keys, 12) if len(keys) > 30 else keys
    return [at, *(path for key in keys for path in places(value[key], rng, (*at, key)))]


def mutant(value: Any, rng: random.Random) -> Any:
    """One to three members replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(places(value, rng)[1:] or [()])
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        act = rng.random()
        if path and act < 0.6:
            inner[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        elif path and act < 0.8:
            del inner[path[-1]]
        elif isinstance(inner, dict):
            inner[str(rng.choice(JUNK))] = copy.deepcopy(rng.choice(JUNK))
        elif isinstance(inner, list):
            inner.append(copy.deepcopy(rng.choice(JUNK)))
    return value


def fits(value: Value) -> bool:
    """The value can be written with its type."""
    members = value.value if isinstance(value.value, tuple) else (value.value,)
    if value.kind in ("u32", "i32"):
        low, high = (0, 2**32) if value.kind == "u32" else (-(2**31), 2**31)
        return all(isinstance(one, int) and low <= one < high for one in members)
    return all(isinstance(one, PYTHON[value.kind]) for one in members)


def special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


@pytest.mark.slow
def test_mutants(tmp_path: Path) -> None:
    rng = random.Random(0)
    make_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [special("<bos>"), a],
                                   "pair": [special("<bos>"), a, special("<bos>"), b]}  # fmt: skip
    words = json.loads((tmp_path / "tokenizer_config.json").read_text())
    words |= {"extra_special_tokens": ["<|turn>"], "model_specific_special_tokens": {"one": "<turn|>"}}
    card = {"license": "x", "base_model": ["a/b"], "datasets": ["c/d"], "tags": ["t"], "language": ["en"]}
    picture = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    whole: dict[str, Any] = {"tokenizer.json": tokenizer, "tokenizer_config.json": words,
                             "generation_config.json": {"temperature": 1.0, "top_k": 3}, "README.md": card,
                             "config.json": {}, "picture": picture}  # fmt: skip
    models: list[Callable[..., Any]] = [trunk, drafter, tower]
    refused = 0
    for _ in range(MUTANTS):
        config, shapes = rng.choice(models)()
        found = {**whole, "config.json": config}
        broken = rng.choice(list(found))
        found[broken] = mutant(found[broken], rng)
        for name, value in found.items():
            text = f"---\n{yaml.safe_dump(value)}---\n" if name == "README.md" else json.dumps(value)
            (tmp_path / name).write_text(text)
        config = found["config.json"]
        try:
            vision = isinstance(config, dict) and "vision_config" in config and rng.random() < 0.5
            layout = gguf_vision_layout(config, shapes, found["picture"]) if vision else gguf_layout(config, shapes)
            metadata = file_metadata(tmp_path, config, layout, name="x/y", file_type=3)
        except GemcutError:
            refused += 1
        else:
            assert all(fits(value) for value in metadata.values()), (broken, found[broken])
    assert MUTANTS // 10 < refused < MUTANTS * 9 // 10
