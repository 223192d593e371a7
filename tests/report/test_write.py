"""The folder is written whole or not at all, and holds no local path."""

from __future__ import annotations

import dataclasses
import getpass
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.report.fixture import full

from gemcut.errors import QualityError, UsageError
from gemcut.report import write, write_report


def test_all_files_are_written_and_are_the_same_twice(tmp_path: Path) -> None:
    one, two = (write_report(full(), tmp_path / name) for name in ("one", "two"))
    assert one.index_html.is_file()
    assert one.card.name == "README.md"
    assert len(one.figures) == 6
    assert all(path.is_file() for path in one.figures)
    written = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*"))
    assert written == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*"))
    for path in written:
        if (tmp_path / "one" / path).is_file():
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    assert one.index_html.stat().st_size < 400_000
    assert two.index_html.parent == tmp_path / "two"


def test_an_existing_report_is_kept_without_force(tmp_path: Path) -> None:
    write_report(full(), tmp_path / "r")
    with pytest.raises(UsageError, match="exists"):
        write_report(full(), tmp_path / "r")
    other = dataclasses.replace(full(), title="another title")
    assert "another title" in write_report(other, tmp_path / "r", force=True).index_html.read_text()


def test_no_path_host_or_user_leaves(tmp_path: Path) -> None:
    secret = str(tmp_path / "base")
    data = full()
    data = dataclasses.replace(
        data,
        title=f"cut of {secret}",
        candidate=dataclasses.replace(data.candidate, name=secret),
        kld=tuple(dataclasses.replace(entry, label=f"{entry.label} {secret}") for entry in data.kld),
        chosen=f"class_rank {secret}",
        recipe=f"base: {secret}\n",
        commands=(f"gemcut run {secret}/r.yaml",),
    )
    files = write_report(data, tmp_path / "r")
    for path in (files.index_html, files.card, *files.figures):
        text = path.read_text()
        assert str(tmp_path) not in text
        for name in (getpass.getuser(), socket.gethostname()):
            assert len(name) < 5 or name not in text


def test_a_path_that_slips_through_stops_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "find_path", lambda text: "/home/ann/base")
    with pytest.raises(QualityError, match="local path"):
        write_report(full(), tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_room_draws_in_no_heavy_package() -> None:
    program = "import sys, gemcut.report; print(sorted({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
