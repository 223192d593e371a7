"""The files beside the weights, and the list of their hashes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.checkpoint.folder import copy_file, link_file, list_files, parse_sums, sums_text
from gemcut.errors import CheckpointError

names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="\\:/"), min_size=1, max_size=12)


@given(st.dictionaries(names, st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}"), max_size=5))
def test_sums_read_back(files: dict[str, str]) -> None:
    assert parse_sums(sums_text(files).encode()) == files


@pytest.mark.parametrize("raw", [b"\xff", b"x\n", b"0" * 64 + b"  a\n" + b"0" * 64 + b"  a\n", b"0" * 64 + b"  \n"])
def test_malformed_sums(raw: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_sums(raw)


@pytest.mark.parametrize("name", ["new\nline", "back\\slash", "co:lon", "bell\a"])
def test_names_that_no_record_can_hold(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="no record can hold"):
        list_files(tmp_path)


def test_order_and_what_is_left_out(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a/manifest.json", "manifest.json", "SHA256SUMS", ".git/x", "x.partial", "a/.cache/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert list_files(tmp_path) == ["a/manifest.json", "a/z", "b"]


def test_a_copy_is_a_new_file(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.write_bytes(os.urandom(5_000_001))
    os.chmod(source, 0o400)
    copy_file(source, tmp_path / "deep" / "t")
    assert (tmp_path / "deep" / "t").read_bytes() == source.read_bytes()
    assert (tmp_path / "deep" / "t").stat().st_nlink == 1
    with pytest.raises(FileExistsError):
        copy_file(source, tmp_path / "deep" / "t")


def test_a_link_goes_to_the_file_behind_the_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "name").symlink_to("blob")
    assert link_file(tmp_path / "name", tmp_path / "out")
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").samefile(tmp_path / "blob")


def test_where_links_are_impossible_it_says_so(tmp_path: Path) -> None:
    assert not link_file(Path("/proc/self/status"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
