"""The closed vocabulary: every shipped recipe is valid, every wrong word is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gemcut import recipe
from gemcut.errors import UsageError

GOOD = """
name: x
model: demo:moe
observe: {corpus: "demo:calibration"}
score: reap
plan: {keep: 4}
"""


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_are_valid(name: str) -> None:
    words = recipe.load(name)
    assert words.name == name
    assert words.description
    again = recipe.parse(recipe.resolved(words), "resolved")
    assert again == words


def test_shorthand_and_defaults() -> None:
    words = recipe.parse(GOOD, "x")
    assert words.score.criterion == "reap"
    assert words.plan.guards.bootstrap == 200
    assert words.kld is None


def test_set_reaches_every_depth() -> None:
    sets = ("plan.keep=6", "plan.guards.class_floor=2", "score.params.of=f", "kld.corpus=c.jsonl")
    words = recipe.parse(GOOD, "x", sets)
    assert words.plan.keep == 6
    assert words.plan.guards.class_floor == 2
    assert words.score.criterion == "reap"
    assert words.score.params == {"of": "f"}
    assert words.kld is not None


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("plan.kep=3", "plan.kep"),
        ("plan.keep=three", "plan.keep"),
        ("plan.keep=0", "plan.keep"),
        ("modell=x", "modell"),
        ("observe.max_tokens_per_item=1e3", "observe.max_tokens_per_item"),
        ("name=../escape", "name"),
        ("plan.guards=3", "plan.guards"),
        ("schema=2", "schema"),
    ],
)
def test_wrong_words_are_named(override: str, names: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse(GOOD, "x.yaml", (override,))
    assert names in str(caught.value)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("{variant: auto, target: BAR}", "gguf.imatrix.target: no such file type"),
        ("{variant: auto}", "gguf.imatrix: variant auto and target go together"),
        ("{target: IQ2_M}", "gguf.imatrix: variant auto and target go together"),
    ],
)
def test_importances_judged_by_no_file_type(said: str, names: str) -> None:
    sets = ("gguf.tiers=[Q8_0]", f"gguf.imatrix={said}")
    with pytest.raises(UsageError) as caught:
        recipe.parse(GOOD, "x.yaml", sets)
    assert names in str(caught.value)
    recipe.parse(GOOD, "x.yaml", ("gguf.tiers=[Q8_0]", "gguf.imatrix={variant: auto, target: iq2_m}"))


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "!!python/object/apply:os.system [id]", "name: x"])
def test_not_a_recipe(text: str) -> None:
    with pytest.raises(UsageError):
        recipe.parse(text, "x.yaml")


def test_no_such_recipe_lists_the_shipped() -> None:
    with pytest.raises(UsageError, match="demo-moe"):
        recipe.load("nothing")


def test_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UsageError, match="UTF-8"):
        recipe.load(str(tmp_path / "r.yaml"))


def test_every_word_is_in_the_schema_table() -> None:
    paths = {path.replace("[]", "") for path, *_ in recipe.words()}

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                assert prefix + key in paths, prefix + key
                if not (prefix + key).endswith("params"):
                    walk(value, f"{prefix}{key}.")

    walk(yaml.safe_load(recipe.resolved(recipe.load("demo-moe"))), "")
