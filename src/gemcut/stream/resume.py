"""Work that grows in a folder layer by layer: is it this very work, is it whole, what did a killed one leave?

A folder is named by a fingerprint of everything that decides its numbers. While it grows it is called `OUT.partial` and
has a progress file, written last after every layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.fields import Fields
from gemcut.store import read_json, write_json
from gemcut.types import Json

PROGRESS_FILE = "progress.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LayerWork:
    """How messages speak of one kind of work.

    name: "observation".   verb: "observe".   depends: "model, corpus or settings", what its fingerprint is of.
    """

    name: str
    verb: str
    depends: str

    def finished(self, out: Path, digest: str, fingerprint_of: Callable[[Path], str | None], *, force: bool) -> bool:
        """Whether `out` is this very work, whole.

        Args:
            fingerprint_of: reads it from a folder; None where the folder holds no such work.
        Raises:
            UsageError: it is something else, and not `force`.
        """
        if force or not out.exists():
            return False
        found = fingerprint_of(out)
        if found is None:
            raise UsageError(f"the output exists and is no {self.name}", where=str(out), hint=self._hint)
        self._refuse_other(found, digest, f"the output holds the {self.name} of another {self.depends}", out)
        return True

    def save(self, folder: Path, digest: str, body: Mapping[str, Json]) -> None:
        """Make progress known, atomically."""
        write_json(folder / PROGRESS_FILE, {"fingerprint": digest, **body})

    def left_behind(self, folder: Path, digest: str, read: Callable[[Fields], T], *, force: bool) -> T | None:
        """What a killed run of the same fingerprint left in `folder`.

        With `force`, or where it is unusable, the folder is removed, and there is nothing.

        Args:
            read: the body of the progress file; raises CheckpointError where files that it speaks of are gone.
        Raises:
            UsageError: unfinished work of another fingerprint lies there, and not `force`.
        """
        path = folder / PROGRESS_FILE
        if path.is_file() and not force:
            try:
                f = Fields(read_json(path, "progress"), path)
                found, done = f.digest("fingerprint"), read(f)
                f.done()
            except CheckpointError:
                pass
            else:
                what = f"the unfinished {self.name} of another {self.depends} lies in the way"
                self._refuse_other(found, digest, what, folder)
                return done
        if folder.exists():
            shutil.rmtree(folder)
        return None

    @property
    def _hint(self) -> str:
        return f"choose another -o, or pass --force to {self.verb} again"

    def _refuse_other(self, found: str, digest: str, what: str, where: Path) -> None:
        if found != digest:
            raise UsageError(
                what,
                where=str(where),
                got=f"{found[:12]}…",
                wanted=f"{digest[:12]}…",
                hint=self._hint,
            )
