"""Work that is stopped in the middle, and what it leaves, for tests of resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Stop(Exception):
    pass


def stop_at(label: str) -> Callable[[int, int, str], None]:
    """A progress function that ends the work where it first says `label`."""

    def progress(done: int, total: int, said: str) -> None:
        if said == label:
            raise Stop

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
