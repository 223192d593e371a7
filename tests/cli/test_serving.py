"""The command that serves an NVFP4 folder, as `gemcut nvfp4` and `gemcut show` print it; the words of the verb."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from tests.cli.verb import gemcut

from gemcut.cli.nvfp4 import nvfp4
from gemcut.vocabulary import Nvfp4Words, choices_of
from tiny import add_vision, make_tiny


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_vision(make_tiny(tmp_path_factory.mktemp("tiny") / "moe"))


def test_the_command_that_serves_it(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "it's mine"
    words = ("--kv", "one", "--drafter", "demo:moe-drafter", "-o", out)
    code, said, _ = gemcut(capsys, "nvfp4", moe, *words, "--json")
    assert code == 0
    served = json.loads(said)["serving"]
    assert served["command"][:3] == ["vllm", "serve", str(out)]
    assert served["command"][served["command"].index("--kv-cache-dtype") + 1] == "fp8"
    assert "demo/moe-drafter" in served["line"]
    assert json.loads(said)["relative_error"] < 0.1
    code, said, _ = gemcut(capsys, "show", out, "--drafter", "demo:moe-drafter", "--json")
    assert code == 0
    assert json.loads(said) == served, "from the folder alone"
    code, said, _ = gemcut(
        capsys, "show", out, "--cards", "2", "--images", "0", "--context", "99", "--served-name", "g"
    )
    assert code == 0
    for flag in ("--tensor-parallel-size 2", "--language-model-only", "--max-model-len 99", "--served-model-name g"):
        assert flag in said
    assert "Marlin" in said
    assert gemcut(capsys, "nvfp4", moe, "-o", tmp_path / "other")[1].count("vllm serve") == 1


def test_show_of_what_is_no_such_folder(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gemcut(capsys, "show", moe)
    assert code == 4
    assert "does not speak of NVFP4" in err
    code, _, err = gemcut(capsys, "show", "demo-nvfp4", "--cards", "2")
    assert code == 2
    assert "would change nothing here" in err


def test_the_verb_has_the_words_of_the_recipe() -> None:
    """Choices and defaults of the flags are those of `nvfp4:`; only what a run adds has no word."""
    flags = {option.name: option for option in nvfp4.params if isinstance(option, click.Option)}
    fields = Nvfp4Words.model_fields
    assert set(fields) <= set(flags)
    assert set(flags) - set(fields) == {
        "out", "stats", "convert", "copy", "force", "dry_run", "as_json", "quiet", "verbose",
    }  # fmt: skip
    for name, info in fields.items():
        if choices := choices_of(info.annotation):
            assert list(flags[name].type.choices) == choices  # type: ignore[attr-defined]
        if name != "ignore":
            assert flags[name].default == info.default
