"""The run folder: stages that are done once, found again by key, and one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut import machine, store
from gemcut.errors import UsageError
from gemcut.recipe import Recipe
from gemcut.types import Json, KldResult

if TYPE_CHECKING:
    from gemcut.nvfp4_stages import Packed

log = logging.getLogger(__name__)

# Raise a number when the stage's result changes for the same inputs: old folders are then done again.
VERSIONS: Mapping[str, int] = {
    "observe": 1, "importance": 1, "plan": 1, "heal": 2, "cut": 2, "verify": 2, "canary": 1, "salvage": 2, "kld": 1,
    "imatrix": 1, "curvature": 1, "gguf": 1, "nvfp4": 1,
}  # fmt: skip

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """One finished or found stage."""

    name: str
    key: str
    folder: Path
    seconds: float
    peak_rss_bytes: int
    reused: bool


@dataclass(slots=True)
class Run:
    """What a recipe left behind. `folder` is the run folder."""

    recipe: Recipe
    folder: Path
    done: list[Stage] = field(default_factory=list)
    model: Path | None = None
    report: Path | None = None
    chosen: str | None = None
    measured: dict[str, KldResult] | None = None
    files: tuple[Path, ...] = ()  # GGUF
    packed: Packed | None = None  # NVFP4
    quantised: dict[str, KldResult] | None = None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One run per folder: the lock goes with the process, so a killed run leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                "another gemcut works in this run folder",
                where=str(folder),
                hint="wait for it, or choose another --runs",
            ) from None
        yield


class Stages:
    """Runs stages once: looks for a finished folder of the same key first."""

    def __init__(self, run: Run, *, force: bool) -> None:
        self.run = run
        self.force = force

    def __call__(
        self,
        name: str,
        label: str,
        params: Mapping[str, object],
        parents: tuple[str, ...],
        build: Callable[[Path], object],
    ) -> Stage:
        version = VERSIONS[name]
        plain: dict[str, Json] = json.loads(store.canonical_json(dict(params)))
        key = store.fingerprint({"stage": name, "version": version, "params": plain, "parents": list(parents)})[:12]
        folder = self.run.folder / "-".join(part for part in (name, label, key) if part)
        if before := next((one for one in self.run.done if one.folder == folder), None):
            return before
        record = folder / "stage.json"
        if record.is_file() and not self.force:
            found = store.read_json(record, "stage record")
            if found.get("key") == key:
                stage = Stage(name, key, folder, _number(found, "seconds"), int(_number(found, "peak_rss_bytes")), True)
                self.run.done.append(stage)
                log.info("%s: finished before, kept", folder.name)
                return stage
        folder.mkdir(parents=True, exist_ok=True)
        machine.reset_peak()
        start = time.perf_counter()
        build(folder)
        seconds = time.perf_counter() - start
        peak = machine.peak_rss_bytes()
        store.write_json(
            record,
            {
                "stage": name,
                "label": label,
                "version": version,
                "key": key,
                "params": plain,
                "parents": list(parents),
                "seconds": round(seconds, 3),
                "peak_rss_bytes": peak,
                "stack": dict(machine.stack()),
            },
        )
        stage = Stage(name, key, folder, seconds, peak, False)
        self.run.done.append(stage)
        log.info("%s: %.1f s, peak memory %.2f GiB", folder.name, seconds, peak / 2**30)
        return stage


def _number(record: Mapping[str, Json], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0
