"""The lazy group, exit codes and streams, through the real entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemcut.cli.main import VERBS


def gemcut(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gemcut.cli.main", *args], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_help_lists_every_verb_on_stdout() -> None:
    done = gemcut("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for verb in VERBS:
        assert f"  {verb} " in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("ispect", "x"), 2, "Did you mean 'inspect'?"),
        (("inspect",), 2, "MODEL"),
        (("inspect", "no/such/folder/at/all"), 2, "no/such/folder/at/all"),
        (("show", "nothing"), 2, "gemcut list"),
        (("run", "nothing"), 2, "demo-moe"),
        (("run", "demo-moe", "--set", "plan.kep=3"), 2, "plan.kep"),
        (("run", "demo-moe", "--until", "noon"), 2, "noon"),
        (("plan", "experts", "nowhere", "--keep", "3"), 2, "--explain"),
        (("inspect", "demo:huge"), 2, "demo:moe"),
        (("run", "demo-moe", "--no-salvage"), 2, "no canary"),
        (("run", "demo-heads", "--set", "plan.layers=all", "--until", "plan"), 2, "for example 0-3,5"),
        (("plan", "heads", "nowhere", "--drop", "0.125", "-o", "p.json"), 2, "nowhere"),
    ],
)
def test_wrong_use_is_one_clear_message(tmp_path: Path, args: tuple[str, ...], code: int, says: str) -> None:
    done = gemcut(*args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_error_block_is_short(tmp_path: Path) -> None:
    done = gemcut("inspect", "missing-folder", cwd=tmp_path)
    assert len(done.stderr.strip().splitlines()) <= 4


def test_list_and_show_as_json() -> None:
    found = json.loads(gemcut("list", "--json").stdout)
    assert set(found) == {"recipes", "criteria", "families"}
    assert "demo-moe" in found["recipes"]
    shown = json.loads(gemcut("show", "reap", "--json").stdout)
    assert "Σ" in shown["definition"]
    schema = json.loads(gemcut("show", "schema", "--json").stdout)
    assert schema["additionalProperties"] is False


def test_doctor_reports_memory_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMCUT_LIBLLAMA", raising=False)
    found = json.loads(gemcut("doctor", "--json").stdout)
    assert found["memory_gib"] > 0
    assert found["package_torch"][0].isdigit()
    assert "cpu" in found["devices"]
    assert "(llama.cpp" in found["llama_cpp"]
    assert found["llama_cpp_from"] == "the wheel xllamacpp"


def test_doctor_says_that_a_named_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMCUT_LIBLLAMA", str(tmp_path / "none.so"))
    found = json.loads(gemcut("doctor", "--json").stdout)
    assert found["llama_cpp"] == "the named llama.cpp library does not exist; check GEMCUT_LIBLLAMA"
    assert found["llama_cpp_from"] == "GEMCUT_LIBLLAMA"
