"""Docs live beside the code and cannot go stale."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemcut import recipe, score
from gemcut.cli.main import VERBS
from gemcut.score.criterion import check_params
from gemcut.score.heads import head_criterion_named

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["docs/build.py", "bench/run.py"])
def test_written_pages_are_current(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_documented(verb: str) -> None:
    assert f"## gemcut {verb}\n" in (ROOT / "docs" / "cli.md").read_text()


def test_overview_texts_are_the_commands_own() -> None:
    import importlib

    for verb, (where, text) in VERBS.items():
        module, _, attribute = where.partition(":")
        help_text = getattr(importlib.import_module(module), attribute).help
        assert help_text.split("\n\n")[0].replace("\n", " ") == text, verb


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_name_real_criteria_with_real_parameters(name: str) -> None:
    words = recipe.load(name)
    for choice in (words.score, *words.compare) if words.score is not None else ():
        if words.plan.kind == "heads":
            check_params(choice.criterion, head_criterion_named(choice.criterion).params, choice.params)
        else:
            score.criterion_named(choice.criterion).check(choice.params)


def test_readme_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text()
    rooms = [p for p in (ROOT / "src" / "gemcut").iterdir() if p.is_dir() and (p / "__init__.py").is_file()]
    for room in rooms:
        assert f"{room.name}/" in readme, room.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "demo" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_tracked_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    places = rb"work|farm|root"
    pattern, strict = (re.compile(rb"(?<![\w.])/(?:" + p + rb")/[a-z]") for p in (places, places + rb"|home|Users"))
    for name in listed.stdout.split(b"\0"):
        path = ROOT / name.decode()
        if path.suffix in {".safetensors", ".png"} or not path.is_file() or path == Path(__file__):
            continue
        # tests of the redaction need homes to redact
        found = (pattern if name.startswith(b"tests/") else strict).search(path.read_bytes())
        assert found is None, f"{name.decode()}: {found}"
