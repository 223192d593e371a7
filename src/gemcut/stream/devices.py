"""Which devices torch sees here, and how many cores it should use."""

from __future__ import annotations

import logging
import os

import psutil
import torch

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.3


def use_free_cores() -> int:
    """Set torch's threads to the cores that nobody else is using right now; returns their number.

    Threads of one operation wait for each other by spinning, so that one thread too many on a busy machine costs far
    more than it brings. OMP_NUM_THREADS, when set, is left alone.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    busy = psutil.cpu_percent(interval=_LOOK_SECONDS, percpu=True)  # this process sleeps meanwhile
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else len(busy)
    threads = max(1, min(cores, round(cores - sum(busy) / 100)))
    if threads < cores:
        log.info("the machine is loaded: %d of %d cores are used", threads, cores)
    torch.set_num_threads(threads)
    return threads


def device_names() -> tuple[str, ...]:
    """Names that --device takes: "cpu" always, then every CUDA device, then Apple's."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return tuple(names)
