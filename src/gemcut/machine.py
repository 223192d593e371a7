"""What this machine has and how fast it is: memory, disk, cores, and rates measured now, not remembered."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

_STACK = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface_hub")
_OPTIONAL = ("compressed_tensors",)
_PROBE_BYTES = 64 << 20
_LOOK_SECONDS = 0.3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates: bytes per second for the disk, floating point operations per second for the arithmetic."""

    read: float | None
    write: float | None
    flops: float


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since `reset_peak` (Linux) or since it began."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10


def reset_peak() -> None:
    """Start the peak anew where the kernel can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def available_bytes() -> int:
    """Memory that a new allocation can have without swapping."""
    return int(psutil.virtual_memory().available)


def total_bytes() -> int:
    """All memory of the machine."""
    return int(psutil.virtual_memory().total)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores() -> int:
    """Cores that nobody else uses right now, at least 1; OMP_NUM_THREADS, where it is set, is the answer.

    Threads of one operation wait for each other by spinning, so that one thread too many on a busy machine costs far
    more than it brings. Looks for a third of a second.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if told.isdecimal() and int(told) > 0:
        return int(told)
    busy = psutil.cpu_percent(interval=_LOOK_SECONDS, percpu=True)  # this process sleeps meanwhile
    free = max(1, min(cores(), round(cores() - sum(busy) / 100)))
    if free < cores():
        log.info("the machine is loaded: %d of %d cores are used", free, cores())
    return free


def load() -> float:
    """Runnable processes per core over the last minute; above one, timings are not to be trusted."""
    return os.getloadavg()[0] / cores() if hasattr(os, "getloadavg") else 0.0


def stack() -> dict[str, str]:
    """Versions that a number depends on, optional packages where they are installed; no host, user or path."""
    versions = {"python": platform.python_version()}
    for name in _STACK:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    for name in _OPTIONAL:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def measure_rates(source: Path | None, out: Path) -> Rates:
    """Read up to 64 MiB of a weight file, write and fsync 64 MiB beside the output, multiply float32 matrices.

    Takes about half a second. The read may come from the page cache; then it is the rate that the run will see too.
    """
    read = write = None
    if source is not None and source.is_file():
        start = time.perf_counter()
        with open(source, "rb", buffering=0) as f:
            done = len(f.read(_PROBE_BYTES))
        read = done / max(time.perf_counter() - start, 1e-9)
    folder = out
    while not folder.exists():
        folder = folder.parent
    probe = folder / f".gemcut-probe-{os.getpid()}"
    try:
        block = os.urandom(1 << 20) * (_PROBE_BYTES >> 20)
        start = time.perf_counter()
        with open(probe, "wb") as f:
            f.write(block)
            f.flush()
            os.fsync(f.fileno())
        write = len(block) / max(time.perf_counter() - start, 1e-9)
    except OSError:
        write = None
    finally:
        probe.unlink(missing_ok=True)
    return Rates(read, write, _flops())


def _flops() -> float:
    size = 1024
    a = np.ones((size, size), np.float32)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        _ = a @ a
        best = max(best, 2 * size**3 / max(time.perf_counter() - start, 1e-9))
    return best
