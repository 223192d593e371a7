"""Which devices torch sees here, and how many cores it should use."""

from __future__ import annotations

import os

import torch

from gemcut.errors import MissingError
from gemcut.machine import free_cores


def use_free_cores() -> int:
    """Set torch's threads to the cores that nobody else is using right now; returns their number.

    OMP_NUM_THREADS, when set, is left alone.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(free_cores())
    return torch.get_num_threads()


def device_names() -> tuple[str, ...]:
    """Names that --device takes: "cpu" always, then every CUDA device, then Apple's."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return tuple(names)


def check_device(name: str) -> str:
    """Refuse a device that is not here before anything is read.

    Raises:
        MissingError: torch does not see it.
    """
    try:
        torch.zeros(1, device=name).add_(1)
    except (RuntimeError, AssertionError) as error:
        raise MissingError(
            "torch cannot use this device",
            got=name,
            wanted="cpu, or one that gemcut doctor lists",
            hint=str(error).splitlines()[0][:120],
        ) from None
    return name
