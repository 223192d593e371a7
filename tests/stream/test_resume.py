"""What a folder of growing work is taken for: this work, another, nothing, or a remainder that is of no use."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.fields import Fields
from gemcut.stream.resume import PROGRESS_FILE, LayerWork

WORK = LayerWork("survey", "survey", "model or settings")
MINE, OTHER = "a" * 64, "b" * 64


def fingerprint_of(out: Path) -> str | None:
    return (out / "name").read_text() if (out / "name").is_file() else None


def test_finished_is_this_work_and_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not WORK.finished(out, MINE, fingerprint_of, force=False)
    out.mkdir()
    with pytest.raises(UsageError, match="exists and is no survey"):
        WORK.finished(out, MINE, fingerprint_of, force=False)
    (out / "name").write_text(OTHER)
    with pytest.raises(UsageError, match="holds the survey of another model or settings") as refused:
        WORK.finished(out, MINE, fingerprint_of, force=False)
    assert "--force to survey again" in str(refused.value)
    assert not WORK.finished(out, MINE, fingerprint_of, force=True)
    (out / "name").write_text(MINE)
    assert WORK.finished(out, MINE, fingerprint_of, force=False)


def left(folder: Path, *, force: bool = False) -> int | None:
    return WORK.left_behind(folder, MINE, lambda f: f.count("layers"), force=force)


def test_what_a_killed_run_left_is_found_again(tmp_path: Path) -> None:
    assert left(tmp_path / "nowhere") is None
    WORK.save(tmp_path, MINE, {"layers": 3})
    assert left(tmp_path) == 3
    assert left(tmp_path) == 3


def test_the_remainder_of_other_work_needs_force(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    WORK.save(folder, OTHER, {"layers": 3})
    with pytest.raises(UsageError, match="unfinished survey of another model or settings"):
        left(folder)
    assert (folder / PROGRESS_FILE).is_file()
    assert left(folder, force=True) is None
    assert not folder.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"layers": 3}', f'{{"fingerprint": "{MINE}", "layers": -1}}',
             f'{{"fingerprint": "{MINE}", "layers": 1, "more": 1}}'],
)  # fmt: skip
def test_a_remainder_of_no_use_is_removed(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / PROGRESS_FILE).write_text(text)
    assert left(folder) is None
    assert not folder.exists()


def test_files_that_are_gone_make_it_useless(tmp_path: Path) -> None:
    def read(f: Fields) -> int:
        raise CheckpointError("a layer is gone")

    folder = tmp_path / "out.partial"
    WORK.save(folder, MINE, {"layers": 3})
    assert WORK.left_behind(folder, MINE, read, force=False) is None
    assert not folder.exists()
